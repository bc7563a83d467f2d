"""`sdtrain exposed`: which training steps used a sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdtrain.cli.output import AsJson, print_json, print_table, prints_to_stderr, save_rows
from sdtrain.errors import UserError

if TYPE_CHECKING:
    from filters.exposure.find import By, Search
    from sdtrain.dataset.layout import DatasetDir
    from sdtrain.exposure.exposures import Exposures
    from sdtrain.loading.sample_record import Stage

_SHOWN = 100

# Our own code is imported inside the command, so that help does not wait for torch.


class ExposedBy(StrEnum):
    """The kind of a list's entries."""

    uid = "uid"
    url = "url"
    host = "host"
    sha256 = "sha256"


def exposed(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    uid: Annotated[str | None, typer.Option(help="The sample's uid.")] = None,
    url: Annotated[str | None, typer.Option(help="The image's URL.")] = None,
    host: Annotated[str | None, typer.Option(help="All samples from this host and its subdomains.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Of the downloaded bytes.")] = None,
    entries: Annotated[
        Path | None, typer.Option("--list", help="One entry a line (.txt), or Parquet with a column named like --by.")
    ] = None,
    by: Annotated[ExposedBy, typer.Option(help="What an entry of the list is.")] = ExposedBy.uid,
    data: Annotated[
        list[str] | None, typer.Option(help="Where a dataset is now, as in /old/data=/new/data; may be repeated.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a row for every use to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tell which training steps used a sample, in this run and those before it, and the last checkpoint before that."""
    from sdtrain.exposure.document import document, use_rows
    from sdtrain.exposure.exposures import find_exposures

    given = {"uid": uid, "url": url, "host": host, "sha256": sha256}
    with prints_to_stderr(as_json):
        search = _search({kind: text for kind, text in given.items() if text is not None}, entries, by)
        exposures = find_exposures(run, search, _Moved(data or ()))
    if csv is not None:
        save_rows(use_rows(exposures), csv)
    if as_json:
        print_json(document(exposures))
    else:
        _show(exposures)
        print(*([f"{len(exposures.uses):,} uses: {csv}"] if csv else []), sep="\n", end="\n" if csv else "")


def _search(given: dict[str, str], entries: Path | None, by: ExposedBy) -> Search:
    from filters.exposure.find import Search
    from filters.remove.plan import read_list
    from filters.select.list_entries import read_entries

    if len(given) + (entries is not None) != 1:
        raise UserError("Give one of --uid, --url, --host, --sha256 and --list FILE.")
    if entries is not None:
        return Search(by.value, list(read_list(entries, by.value)))
    ((kind, text),) = given.items()
    named: By = ExposedBy(kind).value
    return Search(named, list(read_entries([text], kind, f"--{kind}")))


class _Moved:
    """Opens a run's datasets where they are now; those on S3 with the tables that training reads."""

    def __init__(self, moved: Sequence[str]) -> None:
        if wrong := [text for text in moved if "=" not in text]:
            raise UserError(f"--data {wrong[0]} does not say where a dataset was and is: give OLD=NEW.")
        self._places = dict(text.split("=", 1) for text in moved)

    def __call__(self, name: str, stage: Stage) -> DatasetDir:
        from sdtrain.dataset.open import dataset_at, open_to_ask

        place = self._places.get(name, name)
        dataset = dataset_at(place)
        return open_to_ask(place, "sdtrain exposed") if dataset.url else dataset


def _show(exposures: Exposures) -> None:
    from sdtrain.exposure.document import document, sample_rows

    if len(exposures.samples) == 1:
        (sample,) = document(exposures)["samples"]
        print(*(text for text in (sample["uid"] or "a removed sample", sample["url"]) if text))
        if sample["uses"]:
            print_table([_use_row(use) for use in sample["uses"]])
    elif len(exposures.samples):
        print_table(list(_first(sample_rows(exposures))))
    print(*_sentences(exposures), sep="\n")


def _first(rows: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for number, row in enumerate(rows):
        if number == _SHOWN:
            return
        yield row


def _use_row(use: dict[str, Any]) -> dict[str, Any]:
    crop = use["crop"]
    box = ", ".join(f"{side:g}" for side in crop["box"]) if crop else "not known"
    is_dropped = {True: "dropped", False: "kept", None: "not known"}[use["is_dropped"]]
    caption = "not known" if use["caption"] is None else use["caption"]
    return {name: use[name] for name in ("run", "step", "epoch")} | {
        "crop": box,
        "caption was": is_dropped,
        "source": use["source"] or "not known",
        "caption": caption,
    }


def _sentences(exposures: Exposures) -> list[str]:
    from sdtrain.exposure.document import clean_checkpoint

    num, used, uses = len(exposures.samples), exposures.num_used, len(exposures.uses)
    said = [f"The first {_SHOWN} samples; --json or --csv FILE gives all."] if num > _SHOWN else []
    steps = "; ".join(f"{trained.run}: {trained.num_steps:,} steps" for trained in exposures.chain)
    counted = f"{num:,} samples found, {used:,} of them used, {uses:,} times in all"
    missing = "Nothing of this is, or is known to have been, in the shards that were read"
    said.append(f"{counted if num else missing} ({steps}).")
    if first := exposures.first():
        found, run = clean_checkpoint(exposures, first), exposures.chain[first[0]].run
        said.append(f"First use: step {first[1]:,} of {run}, counted from 0.")
        said.append(
            f"Last checkpoint before it: {found['path']}, after {found['step']:,} steps."
            if found
            else "No checkpoint from before it is at hand: only training from the start does without these samples."
        )
    return [*said, *exposures.remarks]
