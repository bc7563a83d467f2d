"""Answers are those of a replay, on small plans of every kind."""

import gc

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sdtrain.exposure.crops import crop_of
from sdtrain.exposure.exposures import DROPPED, find_exposures
from sdtrain.exposure.located import present_as_located
from sdtrain.exposure.trained import table_folder
from sdtrain.formats.frozen import load_text_encoder, vae_scaling_factor
from sdtrain.loading import substitutes
from sdtrain.loading.loader import BatchMaker
from sdtrain.loading.sample_plan import SampleIndices
from sdtrain.loading.sample_record import Origin, SampleRecord
from sdtrain.loading.sources import open_samples
from sdtrain.loading.substitutes import SubstituteLog
from sdtrain.training.run_dir import RunDir
from tests.sdtrain.encode.packed_fixtures import Recipe, encode, write_packed
from tests.sdtrain.exposure.run_fixtures import config_of, record_run, replay
from tests.training_fixtures import write_latents, write_models

BUCKETS = [(64, 64), (88, 48)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def everything(dataset, stage):
    """Locates all samples that are there."""
    tables = []
    for path in sorted(table_folder(dataset, stage).glob("[0-9]*.parquet")):
        rows = pq.read_table(path).to_pylist()
        named = [{"uid": r["uid"], "url": r.get("url"), "caption": r.get("caption"), "table": path.name} for r in rows]
        tables.append(pa.Table.from_pylist([row | {"row": number} for number, row in enumerate(named)]))
    return present_as_located(dataset, pa.concat_tables(tables))


def answered(exposures, run=0):
    """(step, position) -> uid, epoch, whether its caption was dropped, and crop."""
    uses, uids = exposures.uses, exposures.located["uid"].to_pylist()
    return {
        (int(uses.steps[n]), int(uses.positions[n])): (
            uids[uses.places[n]],
            int(uses.epochs[n]),
            uses.captions[n] == DROPPED,
            crop_of(exposures, n),
        )
        for n in range(len(uses))
        if uses.runs[n] == run
    }


def replayed(config):
    return {place: (d.uid, d.epoch, d.is_dropped, d.crop) for place, d in replay(config).items()}


@pytest.mark.parametrize("way", ["one", "sources", "held out in blocks", "buckets", "crops", "images"])
def test_all_uses_are_those_of_a_replay(tmp_path, models, way):
    data, changes = {"root": str(tmp_path / "data")}, {"steps": 5, "caption_dropout": 0.3}
    if way in ("one", "held out in blocks"):
        write_latents(tmp_path / "data", models, num_samples=23, samples_per_shard=5)
    if way == "held out in blocks":
        data |= {"shuffle": "blocks", "window_shards": 2}
        changes["validation"] = {"num_samples": 4}
    if way == "sources":
        roots = [write_latents(tmp_path / name, models, num, 4) for name, num in (("a", 9), ("b", 6))]
        data["sources"] = [{"root": str(root), "weight": weight} for root, weight in zip(roots, (1, 2.5), strict=True)]
    if way in ("buckets", "crops", "images"):
        changes["vae"] = "demo"
        dataset = write_packed(tmp_path / "data", size_of=lambda number: (120, 70) if number % 3 else (70, 80))
    if way == "buckets":
        encode(dataset, Recipe("demo", buckets=BUCKETS))
        data["bucket_group"] = 4
    if way == "crops":
        encode(dataset, Recipe("demo", num_crops=2))
    if way == "images":
        data["online_vae"] = True
    config = config_of(tmp_path, models, data, **changes)
    run = record_run(tmp_path / "run", config)
    exposures = find_exposures(run, everything)
    expected = replayed(config)
    if way == "sources":  # whose samples have the same uids
        expected = {place: found[1:] for place, found in expected.items()}
        assert {place: found[1:] for place, found in answered(exposures).items()} == expected
    else:
        assert answered(exposures) == expected
    held_out = ["held 4 of the samples out for validation"] if way.startswith("held") else []
    assert len(exposures.remarks) == len(held_out)
    assert all(words in said for words, said in zip(held_out, exposures.remarks, strict=True))


def test_uses_are_those_of_the_samples_that_took_the_place_of_damaged_ones(tmp_path, models):
    data = write_latents(tmp_path / "data", models, num_samples=23, samples_per_shard=5)
    damaged = [data / "latents" / f"0000{shard}.tar" for shard in (1, 3)]
    whole = [path.read_bytes() for path in damaged]
    config = config_of(tmp_path, models, {"on_corrupt": "skip"}, steps=9, caption_dropout=0.3)
    run = RunDir(record_run(tmp_path / "run", config))
    for path in damaged:
        path.write_bytes(path.read_bytes()[:6000])
    damaged_replay = replayed(config)
    train(run, config, 0, 7, world_size=2)  # and is killed: a checkpoint of step 4 is the last
    damaged[0].write_bytes(whole[0])
    train(run, config, 4, 6, world_size=1)
    damaged[1].write_bytes(whole[1])
    train(run, config, 6, 9, world_size=2)
    repaired = replayed(config)
    damaged[1].write_bytes(whole[1][:6000])
    half_repaired = replayed(config)
    damaged[1].write_bytes(whole[1])
    expected = {
        place: (damaged_replay if place[0] < 4 else half_repaired if place[0] < 6 else repaired)[place]
        for place in repaired
    }
    assert all(replay != expected for replay in (damaged_replay, half_repaired, repaired))
    exposures = find_exposures(run.path, everything)
    assert answered(exposures) == expected
    assert exposures.remarks == []
    one = exposures.samples["uid"][7].as_py()
    alone = find_exposures(run.path, lambda *stored: (rows := everything(*stored)).filter(pc.equal(rows["uid"], one)))
    assert answered(alone) == {place: found for place, found in expected.items() if found[0] == one}


def train(run, config, first_step, end, world_size):
    """The batches of a process that was killed after these steps."""
    store = open_samples(config, vae_scaling_factor(config.vae))
    tokenizer = load_text_encoder(config.text_encoder)[0]
    for rank in range(world_size):
        log = SubstituteLog(run.substitutes, rank, world_size, first_step, is_kept=True)
        maker = BatchMaker(store, tokenizer, config, rank, world_size)
        assert len(list(maker.prefetch(first_step, end, False, log))) == (end - first_step) * maker.accumulation
    del store, maker
    gc.collect()  # which ends its lock


def test_a_remark_names_substitutes_that_were_not_recorded(tmp_path, models, monkeypatch):
    write_latents(tmp_path / "data", models, num_samples=5)
    run = RunDir(record_run(tmp_path / "run", config_of(tmp_path, models, {"on_corrupt": "skip"}, steps=4)))
    log = SubstituteLog(run.substitutes, 0, 1, 2, is_kept=True)
    assert find_exposures(run.path, everything).remarks == []
    run.log.add(step=2, num_substituted=3)  # by a version that kept no record
    (remark,) = find_exposures(run.path, everything).remarks
    assert "3 samples), without recording which" in remark
    monkeypatch.setattr(substitutes, "MOST", 3)
    samples = SampleIndices(np.array([1, 2]), np.array([0, 0]))
    for step in (3, 5, 4):
        log.add(step, samples, {0: 3, 1: 4})
    file = run.substitutes / "rank-00000.bin"
    file.write_bytes(file.read_bytes() + b"half a row")
    found = substitutes.read_substitutes(run.substitutes)
    assert (found.rows.tolist(), found.recorded_from, found.full_from) == ([[3, 1, 0, 3], [3, 2, 0, 4]], 2, 4)
    assert "from step 4 on some uses" in find_exposures(run.path, everything).remarks[1]


def test_a_run_counts_with_the_steps_that_a_later_run_began_with(tmp_path, models):
    data = write_latents(tmp_path / "data", models, num_samples=23, samples_per_shard=5)
    config = config_of(tmp_path, models, {"root": str(data)}, steps=6)
    first = record_run(tmp_path / "first", config, checkpoints=(2, 4, 6))
    later = config_of(tmp_path, models, {"root": str(data)}, steps=3, seed=7, init_from=str(first))
    second = record_run(tmp_path / "second", later, Origin(run=str(first), step=4), checkpoints=(1, 3))
    exposures = find_exposures(second, everything)
    assert [trained.num_steps for trained in exposures.chain] == [4, 3]
    answers = answered(exposures), answered(exposures, 1)
    assert answers == ({k: v for k, v in replayed(config).items() if k[0] < 4}, replayed(later))
    for run, step, expected in ((0, 1, None), (0, 3, (first, 2)), (1, 0, (first, 4)), (1, 2, (second, 1))):
        found = exposures.clean_checkpoint((run, step))
        assert (found and (found.run, found.step)) == expected
    assert exposures.first() == (0, 0)


def test_the_number_of_ranks_changes_no_answer(tmp_path, models):
    data = write_latents(tmp_path / "data", models, num_samples=23, samples_per_shard=5)
    config = config_of(tmp_path, models, {"root": str(data)}, steps=3)
    run = record_run(tmp_path / "run", config)
    before = answered(find_exposures(run, everything))
    RunDir(run).begin(config.model_copy(update={"micro_batch_size": 1, "zero_stage": 2}), 3)
    (run / "DONE").write_text('{"step": 3}')
    assert answered(find_exposures(run, everything)) == before


def test_a_run_without_a_record_is_answered_while_its_data_are_unchanged(tmp_path, models):
    roots = [write_latents(tmp_path / name, models, num, 4) for name, num in (("a", 9), ("b", 6))]
    data = {"sources": [{"root": str(root), "weight": weight} for root, weight in zip(roots, (1, 2.5), strict=True)]}
    config = config_of(tmp_path, models, data, steps=3)
    run = record_run(tmp_path / "run", config, checkpoints=(3,))
    before = answered(find_exposures(run, everything))
    (run / "samples.parquet").unlink()
    again = find_exposures(run, everything)
    assert answered(again) == before
    assert again.remarks == []
    table = roots[0] / "latents" / "00001.parquet"
    pq.write_table(pq.read_table(table).slice(1), table)
    (remark,) = find_exposures(run, everything).remarks
    assert "which samples its steps saw cannot be known" in remark


def test_a_shard_that_was_made_again_is_said_to_be_unknown(tmp_path, models):
    data = write_latents(tmp_path / "data", models, num_samples=23, samples_per_shard=5)
    config = config_of(tmp_path, models, {"root": str(data)}, steps=3)
    run = record_run(tmp_path / "run", config)
    expected, table = answered(find_exposures(run, everything)), data / "latents" / "00002.parquet"
    lost = set(pq.read_table(table)["uid"].to_pylist())
    pq.write_table(pq.read_table(table).take([4, 3, 2, 1, 0]), table)
    exposures = find_exposures(run, everything)
    assert answered(exposures) == {place: found for place, found in expected.items() if found[0] not in lost}
    (remark,) = exposures.remarks
    assert "1 of the 5 shards" in remark


def test_the_record_is_read_as_it_was_written(tmp_path, models):
    roots = [write_latents(tmp_path / name, models, num, 4) for name, num in (("a", 9), ("b", 6))]
    config = config_of(tmp_path, models, {"sources": [{"root": str(root)} for root in roots]}, steps=3)
    run = record_run(tmp_path / "run", config, Origin(run="x", step=3))
    record = SampleRecord.read(run / "samples.parquet")
    assert record.origin == Origin(run="x", step=3)
    assert [source.root for source in record.sources] == list(map(str, roots))
    assert [source.counts.tolist() for source in record.sources] == [[[4], [4], [1]], [[4], [2]]]
    np.testing.assert_array_equal(record.sources[0].firsts, [[0], [4], [8]])
    assert record.first_of(1) == 9
