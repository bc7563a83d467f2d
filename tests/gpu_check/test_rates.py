"""A check's rates on their way into plans."""

from pathlib import Path

import pytest

from sdtrain.dataset.work import WORK
from sdtrain.plan import measured
from sdtrain.plan.estimate import DatasetJob, Machines, Planner
from sdtrain.plan.measured import read_measured, record_measured
from sdtrain.plan.rates import load_rates
from sdtrain.plan.speeds import Load, estimate_speed
from tests.gpu_check.rates import measured_of
from tests.gpu_check.test_results import result


def test_plans_take_a_gpus_own_speeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MEASURED", tmp_path / "measured.json")
    record_measured(measured_of(result("NVIDIA H200", 147.6, 0.36)))
    assert [(s.gpu, s.resolution, s.num_gpus, s.micro_batch) for s in read_measured().training] == [
        ("h200", 512, 1, 32),
        ("h200", 256, 1, 32),
    ]
    found = estimate_speed(Load("h200", 1, 32, 512))
    assert found.images_per_s == 147.6
    assert "measured: 147.6 images/s a GPU at micro-batch 32" in found.source
    assert "python -m tests.gpu_check, 2026-11-29, settings all" in found.source


def test_other_gpus_keep_their_names_and_a_cpu_gives_nothing() -> None:
    assert measured_of(result("NVIDIA GH200 480GB", 9.0, None)).training[0].gpu == "nvidia-gh200-480gb"
    assert measured_of(result("NVIDIA A100-SXM4-80GB", 9.0, None)).training[0].gpu == "a100"
    assert measured_of(result("NVIDIA H200", 9.0, None) | {"device": "cpu"}).training == ()


SCORED = {"model": "ViT-L-14", "dtype": "bf16", "cpu_decoding_images_per_s": 700.0, "gpu_decoding_images_per_s": 900.0}
ENCODED = {"images_per_s": 160.0, "resolution": 512, "precision": "fp16"}


def with_stages(status: str) -> dict:
    """A check that also encoded and scored."""
    stages = [{"name": "encode", "figures": ENCODED}, {"name": "score", "figures": SCORED}]
    found = result("NVIDIA H200", 147.6, 0.36)
    return found | {"stages": [*found["stages"], *(stage | {"status": status} for stage in stages)]}


def test_plans_take_the_rates_of_encoding_by_pixels_and_of_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "MEASURED", tmp_path / "measured.json")
    record_measured(measured_of(with_stages("passed")))

    def lines(gpu: str, resolution: int) -> dict:
        planner = Planner(load_rates(["link_rot=0"], gpu), Machines(1, gpu))
        job = DatasetJob("mine", 512, resolution, 1, 3_600_000)
        return {line.stage: line for line in planner.dataset(job, WORK)}

    large, small, other = lines("h200", 512), lines("h200", 256), lines("h100", 512)
    assert (large["encode"].gpu_hours, small["encode"].gpu_hours) == (1000 / 160, 1000 / 640)
    assert large["encode"].source == "measured: python -m tests.gpu_check, 2026-11-29, fp16, 512 px"
    assert small["encode"].source.endswith("512 px; 160 at 512 px, 640 at 256 by their pixels")
    assert large["score"].gpu_hours == small["score"].gpu_hours == 1000 / 900
    assert large["score"].source.endswith("ViT-L-14, bf16, decoded by the GPU")
    assert other["encode"].source.startswith("published")
    stated = Planner(load_rates(["encode_images=100"], "h200"), Machines(1, "h200"))
    line = next(line for line in stated.dataset(DatasetJob("mine", 256, 256, 1, 10), WORK) if line.stage == "encode")
    assert line.source == "stated: yours", "which is of the plan's own resolution"


def test_a_stage_that_failed_gives_no_rate() -> None:
    assert [rate.name for rate in measured_of(with_stages("passed")).rates] == ["encode_images", "score_images"]
    assert measured_of(with_stages("failed")).rates == ()
    assert measured_of(result("NVIDIA H200", 147.6, 0.36)).rates == ()
