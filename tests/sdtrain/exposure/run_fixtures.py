"""Runs that recorded their samples without training, and the replay that answers are compared with."""

from __future__ import annotations

import gc
import json
from pathlib import Path

from sdtrain.config import TrainConfig, load_config
from sdtrain.formats.frozen import load_text_encoder, vae_scaling_factor
from sdtrain.loading.loader import BatchMaker, DrawnSample
from sdtrain.loading.sample_record import Origin
from sdtrain.loading.sources import open_samples, sample_record
from sdtrain.settings import parse_settings
from sdtrain.training.run_dir import RunDir
from tests.training_fixtures import write_config


def config_of(folder: Path, models: Path, data: dict, **changes) -> TrainConfig:
    """The toy config with other `data`."""
    path = write_config(folder / "c.yaml", models, folder / "data")
    content = load_config(str(path)).model_dump()
    return parse_settings(TrainConfig, content | changes | {"data": content["data"] | data}, "test")


def record_run(folder: Path, config: TrainConfig, origin: Origin | None = None, checkpoints: tuple = ()) -> Path:
    """A finished run's records, as training leaves them."""
    run, store = RunDir(folder), open_samples(config, vae_scaling_factor(config.vae))
    folder.mkdir(parents=True)
    run.begin(config, 0)
    sample_record(store, config, origin).write(run.samples)
    digest = store.digest
    del store
    gc.collect()  # which ends its lock
    run.log.truncate(0)
    (folder / "DONE").write_text(json.dumps({"step": config.steps, "checkpoint": "c"}))
    for step in checkpoints:
        layout = folder / "checkpoints" / f"step-{step:08d}" / "layout.json"
        layout.parent.mkdir(parents=True)
        layout.write_text(json.dumps({"step": step, "data_digest": digest}))
    return folder


def replay(config: TrainConfig, num_steps: int | None = None) -> dict[tuple[int, int], DrawnSample]:
    """(step, position) -> what training draws there."""
    store = open_samples(config, vae_scaling_factor(config.vae))
    maker = BatchMaker(store, load_text_encoder(config.text_encoder)[0], config, rank=0, world_size=1)
    drawn = {
        (step, position): maker.drawn(step, position)[1]
        for step in range(config.steps if num_steps is None else num_steps)
        for position in range(config.global_batch_size)
    }
    del store, maker
    gc.collect()  # which ends its lock
    return drawn
