import csv
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from prefect.testing.utilities import prefect_test_harness

from flows.reproduce_sd_v1 import check, reproduce_sd_v1
from sdtrain.config import known_configs, load_config
from sdtrain.errors import UserError
from sdtrain.formats.checkpoint import find_checkpoint
from sdtrain.plan.chain import PHASES, chain
from tests.training_fixtures import write_config, write_latents, write_models


def test_the_chain_is_the_model_cards() -> None:
    assert [phase.name for phase in chain("sd-v1-3")] == ["sd-v1-1-256", "sd-v1-1-512", "sd-v1-2", "sd-v1-3"]
    assert [phase.name for phase in chain("sd-v1-5")] == ["sd-v1-1-256", "sd-v1-1-512", "sd-v1-2", "sd-v1-5"]
    assert {phase.name for phase in PHASES} <= set(known_configs())
    for phase in PHASES:
        start = load_config(phase.name).init_from
        assert start == (f"runs/{phase.after}" if phase.after else None)


def test_the_steps_dropouts_and_sizes_are_the_model_cards() -> None:
    found = {phase.name: load_config(phase.name) for phase in PHASES}
    assert [config.steps for config in found.values()] == [237_000, 194_000, 515_000, 195_000, 225_000, 595_000]
    assert [config.data.resolution for config in found.values()] == [256, 512, 512, 512, 512, 512]
    assert [config.caption_dropout for config in found.values()] == [0, 0, 0, 0.1, 0.1, 0.1]
    assert {config.global_batch_size for config in found.values()} == {2048}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two toy datasets of other image sizes, and toy configs under the names of the chain."""
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    models = write_models(tmp_path / "models")
    low = write_latents(tmp_path / "low", models, side=4)
    high = write_latents(tmp_path / "high", models, side=8)
    configs = tmp_path / "configs"
    configs.mkdir()
    for phase in PHASES:
        side, data = (32, low) if phase.dataset == "laion2b_en" else (64, high)
        dropout = load_config(phase.name).caption_dropout
        write_config(
            configs / f"{phase.name}.yaml",
            models,
            data,
            name=phase.name,
            data={"root": str(data), "resolution": side},
            steps=3,
            caption_dropout=dropout,
        )
    return {
        "laion2b_en": str(low),
        "high_resolution": str(high),
        "aesthetics": str(high),
        "output": str(tmp_path / "runs"),
        "configs": str(configs),
    }


def test_what_is_missing_for_the_last_run_is_said_before_training_begins(world: dict[str, Any], tmp_path: Path) -> None:
    phases = chain("sd-v1-3")
    check(phases, world, world["configs"])
    with pytest.raises(UserError, match="There are no latents"):
        check(phases, world | {"aesthetics": str(tmp_path / "none")}, world["configs"])
    Path(world["configs"], "sd-v1-3.yaml").unlink()
    with pytest.raises(UserError, match=r"sd-v1-3\.yaml"):
        check(phases, world, world["configs"])


@pytest.mark.long
def test_four_runs_follow_one_another_and_again_means_nothing_to_do(world: dict[str, Any]) -> None:
    with prefect_test_harness(server_startup_timeout=120):
        last = reproduce_sd_v1(**world, until="sd-v1-3")
        again = reproduce_sd_v1(**world, until="sd-v1-3")
    assert last == again == str(Path(world["output"], "sd-v1-3"))
    runs = [Path(world["output"], phase.name) for phase in chain("sd-v1-3")]
    for before, run in itertools.pairwise(runs):
        assert json.loads((run / "DONE").read_text())["step"] == 3
        assert str(before) in (run / "config.yaml").read_text()
        # It begins where the last one ended, so the first step's loss is that of a network that has learnt.
        weights = dict(find_checkpoint(before).weights("master"))
        moved = dict(find_checkpoint(run).weights("master"))
        change = max(float((moved[name] - weights[name]).abs().max()) for name in weights)
        assert 0 < change < 4e-3, "three steps of Adam at 1e-3 move a weight by little more than 3e-3"
    with (runs[0] / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3"]
