"""A removal after training, traced through `remove`, `exposed`, the model card and `plan`."""

import json
import sys

import pyarrow.parquet as pq
import pytest

from filters.exposure.find import Search
from sdtrain import cli
from sdtrain.dataset.layout import DatasetDir
from sdtrain.exposure.exposures import find_exposures
from sdtrain.exposure.known_runs import known_runs, make_known
from sdtrain.impact.energy import EnergyLog, Spent
from sdtrain.loading.sample_record import Origin
from sdtrain.model_card import write_card
from sdtrain.training.run_dir import RunDir
from tests.filters.removal_fixtures import copy_of, remove
from tests.sdtrain.exposure.run_fixtures import config_of, record_run, replay
from tests.training_fixtures import write_latents, write_models


def record_cost(run, steps, seconds, gpu_kwh):
    """The speed and energy that a run recorded of itself, on a GPU with a counter."""
    RunDir(run).log.add(step=steps, loss=0.1, seconds=seconds)
    EnergyLog(run / "energy.csv").add(Spent("a", steps, "NVIDIA H200", 1, 1, 1, 1.0, 1.0, gpu_kwh, 1.0, 1.0, 0.0, 0.0))


def test_a_removal_after_training_is_told_everywhere(photo_dataset, tmp_path, document):
    dataset, models = copy_of(photo_dataset, tmp_path), write_models(tmp_path / "models")
    data = {"root": str(dataset.root), "resolution": 32}
    config = config_of(tmp_path, models, data, vae="demo", steps=6)
    first = record_run(tmp_path / "first", config, checkpoints=(1, 2, 3, 6))
    later = config_of(tmp_path, models, data, vae="demo", steps=4, seed=3, init_from=str(first))
    second = record_run(tmp_path / "second", later, Origin(run=str(first), step=6))
    for run, steps, seconds, kwh in ((first, 6, 3600.0, 12.0), (second, 4, 7200.0, 2.0)):
        record_cost(run, steps, seconds, kwh)
        assert make_known(run) == []
    uses = {}
    for (step, _), drawn in replay(config).items():
        uses.setdefault(drawn.uid, []).append(step)
    uid = max(uses, key=lambda uid: uses[uid][0])  # the one that is seen last
    clean = max(step for step in (1, 2, 3, 6) if step <= uses[uid][0])
    (tmp_path / "list.txt").write_text(uid)
    command = ("remove", dataset.root, "--list", tmp_path / "list.txt")

    before = document(*command, "--dry-run")
    told = document(*command)
    assert before["runs"] == told["runs"]
    costs = {seen["run"]: seen["retraining"] for seen in told["runs"]}
    expected = {
        "first_use": {"run": str(first), "step": uses[uid][0]},
        "clean_checkpoint": str(first / "checkpoints" / f"step-{clean:08d}"),
        "num_steps": 6 - clean,
        "hours": pytest.approx((6 - clean) / 6),
        "kwh": pytest.approx(2.0 * (6 - clean)),
    }
    assert costs[str(first)] == expected
    both = expected | {"num_steps": 10 - clean, "hours": pytest.approx((6 - clean) / 6 + 2)}
    assert costs[str(second)] == both | {"kwh": pytest.approx(2.0 * (6 - clean) + 2)}
    assert not any(seen["remarks"] for seen in told["runs"])

    exposed = document("exposed", first, "--uid", uid)
    assert [use["step"] for use in exposed["samples"][0]["uses"]] == uses[uid]
    assert exposed["samples"][0]["is_removed"]
    assert exposed["clean_checkpoint"]["step"] == clean
    assert document("plan", "--retrain", first)["retraining"] == expected
    card = write_card(second).read_text()
    assert "**Open: training used 1 samples that were removed from its data afterwards.**" in card
    assert f"going on there: {10 - clean:,} steps" in card
    assert f"| {first} | 1 | {len(uses[uid])} | {uses[uid][0]} | {uses[uid][-1]} |" in card


def test_runs_are_known_to_all_datasets_behind_them_and_change_no_data(tmp_path, digests):
    models = write_models(tmp_path / "models")
    roots = [write_latents(tmp_path / name, models, num_samples=8) for name in ("a", "b")]
    before = [digests(DatasetDir(root)) for root in roots]
    first = record_run(tmp_path / "first", config_of(tmp_path, models, {"root": str(roots[0])}))
    second = config_of(tmp_path, models, {"root": str(roots[1])}, init_from=str(first))
    record_run(tmp_path / "second", second, Origin(run=str(first), step=8))
    for _ in range(2):
        assert make_known(first) + make_known(tmp_path / "second") == []
    known = [{found.run.name for found in known_runs(DatasetDir(root))} for root in roots]
    assert known == [{"first", "second"}, {"second"}]
    for root, files in zip(roots, before, strict=True):
        after = digests(DatasetDir(root))
        assert {name: digest for name, digest in after.items() if not name.startswith("runs/")} == files
    assert [found.run for found in known_runs(DatasetDir(roots[1]), [first])] == [first, tmp_path / "second"]


def test_a_dataset_that_cannot_be_written_is_named(tmp_path):
    models = write_models(tmp_path / "models")
    root = write_latents(tmp_path / "data", models, num_samples=8)
    run = record_run(tmp_path / "run", config_of(tmp_path, models, {"root": str(root)}))
    (root / "runs").write_text("in the way")
    (sentence,) = make_known(run)
    assert "a removal from it will not name this run" in sentence


def test_runs_that_are_gone_and_other_machines_are_named(photo_dataset, tmp_path, capsys, monkeypatch):
    dataset = copy_of(photo_dataset, tmp_path)
    dataset.known_runs.mkdir()
    (dataset.known_runs / "0.json").write_text(json.dumps({"host": "node7", "run": "/runs/gone"}))
    (dataset.known_runs / "1.json").write_text("cut sh")
    uid = pq.read_table(dataset.latents_table(0))["uid"][0].as_py()
    (tmp_path / "list.txt").write_text(uid)
    command = ["sdtrain", "remove", str(dataset.root), "--list", str(tmp_path / "list.txt"), "--dry-run"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert "/runs/gone: trained on this dataset on node7, and is not here" in capsys.readouterr().out


def test_a_removal_that_was_killed_before_it_began_leaves_no_trace_in_answers(photo_dataset, tmp_path, monkeypatch):
    dataset, models = copy_of(photo_dataset, tmp_path), write_models(tmp_path / "models")
    config = config_of(tmp_path, models, {"root": str(dataset.root), "resolution": 32}, vae="demo", steps=4)
    run = record_run(tmp_path / "run", config)
    uids = pq.read_table(dataset.latents_table(0))["uid"].to_pylist()
    before = find_exposures(run, Search("uid", uids))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("filters.remove.apply.write_ledger", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(dataset, "uid", uids[:2])
    monkeypatch.undo()
    for gone in ([], uids[2:4]):
        if gone:
            remove(dataset, "uid", gone)
        after = find_exposures(run, Search("uid", uids))
        assert after.remarks == []
        for name in ("steps", "positions", "epochs"):
            assert sorted(getattr(after.uses, name).tolist()) == sorted(getattr(before.uses, name).tolist())
        assert len(after.samples) == len(uids)
