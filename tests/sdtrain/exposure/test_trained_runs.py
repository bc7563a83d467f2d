"""What training itself records is enough for an answer."""

import pytest

from sdtrain.config import load_config
from sdtrain.dataset.layout import DatasetDir
from sdtrain.exposure.exposures import find_exposures
from sdtrain.exposure.known_runs import known_runs
from sdtrain.exposure.retraining import retraining
from sdtrain.loading.sample_record import Origin, SampleRecord
from sdtrain.train import train
from sdtrain.training.run_dir import RunDir
from tests.sdtrain.exposure.run_fixtures import replay
from tests.sdtrain.exposure.test_exposures import answered, everything
from tests.training_fixtures import write_config


@pytest.mark.slow
def test_training_records_its_samples_its_origin_and_itself(tmp_path, world, ranks):
    def trained(name, steps, **changes):
        path = write_config(tmp_path / "config.yaml", *world, name=name, steps=steps, **changes)
        train(load_config(str(path)), RunDir(tmp_path / name), ranks)
        return load_config(str(path))

    first = trained("first", 4)
    trained("second", 3, seed=5, init_from=str(tmp_path / "first"))
    trained("first", 6)  # goes on after the second run has begun
    second = trained("second", 5, seed=5, init_from=str(tmp_path / "first"))
    record = SampleRecord.read(tmp_path / "second" / "samples.parquet")
    assert record.origin == Origin(run=str(tmp_path / "first"), step=4)
    exposures = find_exposures(tmp_path / "second", everything)
    assert exposures.remarks == []
    assert [part.num_steps for part in exposures.chain] == [4, 5]
    for number, config in enumerate((first, second)):
        expected = {place: (d.uid, d.epoch, d.is_dropped, d.crop) for place, d in replay(config).items()}
        assert answered(exposures, number) == expected
    cost = retraining(exposures)
    assert (cost.start, cost.num_steps) == (None, 9)
    assert cost.hours > 0
    known = {found.run for found in known_runs(DatasetDir(world[1]))}
    assert {tmp_path / "first", tmp_path / "second"} <= known


def test_a_run_that_was_killed_before_its_first_checkpoint_records_the_data_that_it_begins_with_again(
    tmp_path, world, ranks
):
    path = write_config(tmp_path / "config.yaml", *world, steps=2)
    config = load_config(str(path))
    RunDir(tmp_path / "run").begin(config, 0)
    (tmp_path / "run" / "samples.parquet").write_bytes(b"of other data")
    train(config, RunDir(tmp_path / "run"), ranks)
    assert SampleRecord.read(tmp_path / "run" / "samples.parquet").origin is None
    assert len(find_exposures(tmp_path / "run", everything).uses) == 2 * config.global_batch_size
