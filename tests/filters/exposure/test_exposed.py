"""`sdtrain exposed` on a dataset that loses samples between runs: answers stay those of a replay."""

import csv
import sys

import pyarrow.parquet as pq
import pytest

from filters.exposure.find import Search
from sdtrain import cli
from sdtrain.exposure.exposures import NOT_KNOWN, find_exposures
from sdtrain.loading.sample_record import Origin
from tests.filters.removal_fixtures import copy_of, remove, uid_of, url_of
from tests.sdtrain.exposure.run_fixtures import config_of, record_run, replay
from tests.training_fixtures import write_models


@pytest.fixture(scope="module")
def history(photo_dataset, photo_site, tmp_path_factory):
    """A dataset, two runs with a removal in between and one behind, and what a replay gave before each.

    (dataset, run, {number: uses as (run, step, position, epoch, is_dropped)}, removed numbers)
    """
    folder, port = tmp_path_factory.mktemp("history"), photo_site[1]
    dataset, models = copy_of(photo_dataset, folder), write_models(folder / "models")
    data = {"root": str(dataset.root), "resolution": 32}
    first = config_of(folder, models, data, vae="demo", steps=9, caption_dropout=0.3)
    uses = dict[str, list[tuple]]()

    def replayed(run, config, num_steps):
        for (step, position), drawn in replay(config, num_steps).items():
            uses.setdefault(drawn.uid, []).append((str(run), step, position, drawn.epoch, drawn.is_dropped))

    record_run(folder / "first", first, checkpoints=(2, 4, 6))
    replayed(folder / "first", first, 6)
    tables = sorted(dataset.latents_table(0).parent.glob("[0-9]*.parquet"))
    kept = [uid for table in tables for uid in pq.read_table(table)["uid"].to_pylist()]
    known = {uid_of(number, port): number for number in range(40)}
    numbers = sorted((known[uid] for uid in kept), key=lambda number: number % 4)  # the second host's first
    remove(dataset, "uid", [uid_of(number, port) for number in (numbers[0], numbers[3], 9)])
    config = config_of(folder, models, data, vae="demo", steps=4, seed=3, init_from=str(folder / "first"))
    record_run(folder / "second", config, Origin(run=str(folder / "first"), step=6), checkpoints=(1, 3))
    replayed(folder / "second", config, 4)
    remove(dataset, "url", [url_of(number, port) for number in (numbers[1], 11)])
    gone = {uid_of(number, port): number for number in (numbers[0], numbers[3], 9, numbers[1], 11)}
    return dataset, folder / "second", uses, gone


def answered(exposures):
    """Uid digest -> uses in order."""
    keys, found = exposures.samples["key"].to_pylist(), {}
    for n in range(len(exposures.uses)):
        uses = exposures.uses
        use = str(exposures.chain[uses.runs[n]].run), *(int(a[n]) for a in (uses.steps, uses.positions, uses.epochs))
        found.setdefault(keys[uses.samples[n]], []).append((*use, int(uses.captions[n])))
    return found


def test_uses_of_samples_that_are_there_and_that_were_removed(history):
    _, run, uses, gone = history
    search = Search("uid", list(uses))
    exposures = find_exposures(run, search)
    assert exposures.remarks == []
    uids = dict(zip(exposures.samples["key"].to_pylist(), exposures.samples["uid"].to_pylist(), strict=True))
    assert {uids[key]: found for key, found in answered(exposures).items()} == uses
    assert set(gone) <= {uids[key] for key in answered(exposures)}


@pytest.mark.parametrize("by", ["url", "host", "sha256"])
def test_other_keys_mean_the_same_samples(history, photo_dataset, by):
    _, run, uses, gone = history
    images = [row for shard in range(5) for row in pq.read_table(photo_dataset.images_table(shard)).to_pylist()]
    chosen = [row for row in images if row["uid"] in uses and "127.0.0.2" in row["url"]]
    entries = {"url": [r["url"] for r in chosen], "host": ["127.0.0.2"], "sha256": [r["sha256"] for r in chosen]}[by]
    exposures = find_exposures(run, Search(by, entries))
    expected = find_exposures(run, Search("uid", [row["uid"] for row in chosen]))
    assert any(row["uid"] in gone for row in chosen)

    def whens(found):
        return {key: [use[:4] for use in when] for key, when in answered(found).items()}

    assert whens(exposures) == whens(expected)
    removed = [n for n in range(len(exposures.uses)) if exposures.uses.captions[n] == NOT_KNOWN]
    assert removed  # whose uids were not given, so that nobody can tell whether their captions were dropped


def test_the_command_prints_one_document(history, document, tmp_path):
    _, run, uses, gone = history
    uid, times = max(uses.items(), key=lambda item: (item[0] not in gone, len(item[1])))
    found = document("exposed", run, "--uid", uid, "--csv", tmp_path / "uses.csv")
    (sample,) = found["samples"]
    assert (sample["uid"], sample["is_removed"]) == (uid, False)
    assert [(u["run"], u["step"], u["position"], u["epoch"], u["is_dropped"]) for u in sample["uses"]] == times
    assert all(use["caption"] == ("" if use["is_dropped"] else use["caption"]) for use in sample["uses"])
    assert all(use["crop"]["source_px"] for use in sample["uses"])
    first = found["first_use"]
    clean = found["clean_checkpoint"]
    steps = [step for step in (2, 4, 6) if step <= first["step"]]
    assert (clean and clean["step"]) == (steps[-1] if steps else None)
    with (tmp_path / "uses.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [use["step"] for use in sample["uses"]]


def test_nothing_found_and_wrong_options_are_said(history, capsys, monkeypatch, tmp_path):
    dataset, run, _, _ = history

    def said(*arguments):
        monkeypatch.setattr(sys, "argv", ["sdtrain", "exposed", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr()

    assert "Nothing of this is" in said(run, "--url", "https://nowhere.example/1.jpg")[1].out
    assert said(run, "--uid", "x")[0] == 2
    assert "Give one of" in said(run)[1].err
    assert "give OLD=NEW" in said(run, "--uid", "0" * 32, "--data", "x")[1].err
    moved = said(run, "--host", "127.0.0.2", "--data", f"{dataset.root}={tmp_path / 'none'}")[1].out
    assert "is not there" in moved
