"""The ladder of optimizations, with made-up speeds."""

import pytest

from sdtrain.config import TrainConfig
from sdtrain.settings import parse_settings
from tests.benchmarks import ladder
from tests.benchmarks.ladder import FIRST, LARGEST_MICRO_BATCH, RUNGS, Climb, Rung, climb
from tests.benchmarks.training_world import settings_of

SPEEDS = {"channels_last": 10, "fused_adamw": -5, "cudnn_benchmark": 3}


def rate(rung: Rung) -> dict[str, float]:
    """Images a second by what is set; attention by cuDNN is not there, and the largest micro-batch does not fit."""
    if rung.speed["attention"] == "cudnn":
        raise RuntimeError("no such kernel")
    if rung.micro_batch == LARGEST_MICRO_BATCH:
        raise MemoryError("out of memory")
    gains = sum(gain for name, gain in SPEEDS.items() if rung.speed[name])
    return {"images_per_s": 100 + gains + 10 * (rung.micro_batch or 0) - 50 * bool(rung.checkpointing)}


@pytest.fixture(autouse=True)
def _has_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "CUDA", True)
    monkeypatch.setattr(ladder, "free_memory", lambda: None)


def test_what_pays_is_kept_and_a_failing_rung_is_told_and_left_out() -> None:
    told: list[int] = []
    climbed = climb(rate, on_rung=lambda climbed: told.append(len(climbed.rungs)))
    assert climbed.rungs["attention=cudnn"] == {"error": "RuntimeError: no such kernel"}
    assert climbed.rungs["micro_batch=x8"] == {"error": "MemoryError: out of memory"}
    assert climbed.best.speed["channels_last"] is True
    assert climbed.best.speed["fused_adamw"] is False, "slower, together with the two that it comes with"
    assert (climbed.best.micro_batch, climbed.best.checkpointing) == (4, False)
    assert (climbed.first, climbed.images_per_s) == (60, 150)
    assert told == list(range(1, len(RUNGS) + 2)), "each rung is told as soon as it is known"


def test_the_first_rung_needs_least_memory() -> None:
    assert FIRST.checkpointing
    assert FIRST.micro_batch == 1
    assert FIRST.speed["attention"] == "sdpa"
    assert all(rung.micro_batch is None or rung.micro_batch > 1 for rung in RUNGS)


def test_a_ladder_whose_first_rung_fails_goes_on() -> None:
    def fails_first(rung: Rung) -> dict[str, float]:
        if not rung.speed["channels_last"]:
            raise RuntimeError("not yet")
        return rate(rung)

    climbed = climb(fails_first)
    assert "error" in climbed.rungs[FIRST.name]
    assert climbed.images_per_s > 0


def test_rungs_that_find_no_time_are_told() -> None:
    climbed: Climb = climb(rate, seconds_left=lambda: 50.0)
    skipped = [name for name, rung in climbed.rungs.items() if "skipped" in rung]
    assert skipped == [rung.name for rung in RUNGS if rung.least_s > 50]
    assert skipped


def test_every_rung_is_a_valid_config_with_the_same_images_in_a_step() -> None:
    content = settings_of("sd-v1-3", 512) | {"micro_batch_size": 8}
    images = 2 * LARGEST_MICRO_BATCH * 8
    for rung in (FIRST, *RUNGS):
        config = parse_settings(TrainConfig, rung.after(FIRST).content(content, images), rung.name)
        assert config.accumulation(1) * config.micro_batch_size == images
