"""`sdtrain search` finds images in the training data; `sdtrain memorised` finds them among samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdtrain.cli.output import print_json, print_table, prints_to_stderr
from sdtrain.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from filters.memorization.samples import Sample
    from filters.search.hits import Hit
    from filters.search.search import Search
    from sdtrain.dataset.layout import DatasetDir

# Our own code is imported inside the commands, so that help does not wait for torch.


def search(
    dataset: Annotated[str, typer.Argument(help="A dataset, scored with stored embeddings: its directory, or s3://…")],
    caption: Annotated[str, typer.Argument(help="What the images are to show.")] = "",
    image: Annotated[Path | None, typer.Option(help="Nearest to this image, instead of a caption.")] = None,
    words: Annotated[bool, typer.Option("--words", help="By the words of captions, without CLIP.")] = False,
    top: Annotated[int, typer.Option(help="How many images.", min=1, max=1000)] = 12,
    kept: Annotated[bool, typer.Option("--kept", help="Only images that were kept.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write a sheet (.png, .html) or the rows (.json).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON, one a line.")] = False,
    serve: Annotated[bool, typer.Option("--serve", help="Serve a page to search on, until Ctrl-C.")] = False,
    host: Annotated[str, typer.Option(help="Where the page is served.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the page; 0 takes a free one.", min=0, max=65535)] = 8040,
) -> None:
    """Find the images of a dataset that are nearest to a caption or an image."""
    from filters.recipe_record import read_recipe
    from filters.search.search import Search
    from sdtrain.dataset.lock import lock_to_read
    from sdtrain.dataset.open import open_to_ask

    if sum((bool(caption), image is not None, serve)) != 1 or (words and not caption):
        raise UserError("Give one of: a caption (with --words, if you like), --image FILE, or --serve.")
    directory = open_to_ask(dataset, "sdtrain search")
    read_recipe(directory)  # raises if there is no dataset
    with lock_to_read(directory, "sdtrain search"):
        asked = Search(directory)
        if serve:
            from filters.search.server import serve as serve_page

            serve_page(asked, host, port, top)
            return
        hits = _find(asked, caption, image, words, top, kept)
        _show(asked, hits, f"Nearest to {image or f'“{caption}”'}", output, as_json)


def memorised(
    source: Annotated[Path, typer.Argument(help="A folder of samples; with --repeated-prompts, a model.")],
    data: Annotated[str, typer.Option(help="The dataset that the model was trained on.")],
    repeated_prompts: Annotated[
        int | None, typer.Option(help="Draw for this many of the captions that repeat most in training.", min=1)
    ] = None,
    per_prompt: Annotated[int, typer.Option(help="Images for each of these.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first of these.", min=0)] = 0,
    guidance: Annotated[float, typer.Option(help="Guidance scale of these.")] = 7.5,
    steps: Annotated[int, typer.Option(help="Sampling steps of these.", min=1)] = 50,
    threshold: Annotated[float, typer.Option(help="Least CLIP cosine that is flagged; a proxy.", min=0, max=1)] = 0.95,
    sscd: Annotated[
        Path | None, typer.Option(help="Weights of SSCD, which then decides in CLIP's place: sscd_disc_mixup.….pt.")
    ] = None,
    sscd_threshold: Annotated[float, typer.Option(help="Least SSCD cosine that is flagged.", min=0, max=1)] = 0.5,
    radius: Annotated[int, typer.Option(help="Bits in which hashes of one image may differ.", min=0, max=32)] = 10,
    top: Annotated[int, typer.Option(help="Training images beside each sample.", min=1, max=20)] = 4,
    output: Annotated[Path, typer.Option(help="Where sheets and JSON go.")] = Path("memorised"),
    as_json: Annotated[bool, typer.Option("--json", help="Print what memorised.json holds.")] = False,
) -> None:
    """Look for samples in the training data: does a model repeat images that it was trained on?"""
    from filters.memorization.check import KINDS, check_samples, write_memorised
    from filters.memorization.samples import draw_samples, read_samples
    from filters.memorization.similarity import Limits
    from filters.recipe_record import read_recipe
    from filters.score.sscd import SscdEncoder
    from filters.search.search import Search
    from sdtrain.dataset.lock import lock_to_read
    from sdtrain.dataset.open import open_to_ask
    from sdtrain.sampling.sampler import SampleSettings

    directory = open_to_ask(data, "sdtrain memorised")
    read_recipe(directory)
    if not source.is_dir() and not repeated_prompts:
        raise UserError(f"There is no folder {source}. Name one with samples, or a model and --repeated-prompts N.")
    encoder = SscdEncoder(sscd) if sscd else None  # before images are drawn
    with prints_to_stderr(as_json), lock_to_read(directory, "sdtrain memorised"):
        samples: Iterable[Sample] = read_samples(source)
        if repeated_prompts:
            prompts, settings = _repeated(directory, repeated_prompts), SampleSettings(guidance, steps)
            samples = draw_samples(source, prompts, per_prompt, seed, output / "samples", settings)
        limits = Limits(threshold, radius, top, sscd_threshold)
        found = check_samples(Search(directory), samples, limits, encoder)
        paths = write_memorised(found, directory, output)
    if as_json:
        print_json(found.document())
        return
    print(*found.notes, sep="\n")
    print(f"{len(found.verdicts):,} samples: " + ", ".join(f"{found.count(kind):,} {kind}" for kind in KINDS))
    print(*paths, sep="\n")


def _repeated(dataset: DatasetDir, num: int) -> list[str]:
    from filters.memorization.samples import repeated_captions

    captions = repeated_captions(dataset, num)
    for caption, count in captions:
        print(f"{count:8,} x {caption}")
    return [caption for caption, _ in captions]


def _find(asked: Search, caption: str, image: Path | None, words: bool, top: int, kept: bool) -> list[Hit]:
    from filters.search.search import read_image_file

    if image is not None:
        return asked.by_images([read_image_file(image)], top, kept)[0]
    if words:
        return asked.by_words(caption, top, kept)
    if asked.is_stand_in:
        typer.echo(
            "CLIP has random weights here, so captions mean nothing to it; --words searches their words.", err=True
        )
    return asked.by_caption(caption, top, kept)


def _show(asked: Search, hits: list[Hit], title: str, output: Path | None, as_json: bool) -> None:
    from filters.search.hits import image_of
    from filters.search.sheet import Cell, Row, write_sheet
    from sdtrain.dataset.files import publish

    rows = [hit.row() for hit in hits]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output is not None and output.suffix == ".json":
        with publish(output) as temporary:
            temporary.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    elif output is not None:
        cells = [
            Cell(image_of(asked.dataset, hit), f"{hit.similarity:.3f} {hit.status}", f"{hit.caption} {hit.url}")
            for hit in hits
        ]
        write_sheet(output, title, [str(asked.dataset)], [Row("", cells)])
    if as_json:
        print(lines, end="")
    elif output is None:
        names = ("similarity", "caption", "url", "key", "status", "image")
        print_table([{name: row[name] for name in names} for row in rows] or [{"nothing": "was found"}])
    if output is not None:
        print(output)
