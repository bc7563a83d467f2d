"""The steps behind a run are all that any of its records tells of."""

import json

from sdtrain.config import load_config
from sdtrain.exposure.lineage import lineage
from sdtrain.training.run_dir import RunDir
from tests.training_fixtures import write_config


def begin(folder, name, init_from=None):
    config = load_config(str(write_config(folder / f"{name}.yaml", folder, folder / "data")))
    run = RunDir(folder / name)
    run.begin(config.model_copy(update={"init_from": init_from and str(init_from)}), 0)
    return run


def save_checkpoint(run, step):
    layout = run.path / "checkpoints" / f"step-{step:08d}" / "layout.json"
    layout.parent.mkdir(parents=True)
    layout.write_text(json.dumps({"step": step}))
    return layout.parent


def test_a_run_that_was_stopped_has_the_steps_of_its_checkpoint_though_it_did_not_log_them(tmp_path):
    run = begin(tmp_path, "stopped")
    assert [link.step for link in lineage(run.path)] == [None]
    save_checkpoint(run, 37)  # before the first row of the log
    (run.path / "log.csv").unlink(missing_ok=True)
    assert [link.step for link in lineage(run.path)] == [37]
    run.log.truncate(0)
    run.log.add(step=50)
    assert [link.step for link in lineage(run.path)] == [50], "trained, if lost by a kill"
    checkpoint = save_checkpoint(run, 63)
    assert [link.step for link in lineage(run.path)] == [63]
    (run.path / "log.csv").unlink()
    after = begin(tmp_path, "after", checkpoint)
    assert [(link.source, link.step) for link in lineage(after.path)][:1] == [(str(run.path), 63)]
