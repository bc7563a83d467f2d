"""A check's training speeds on their way into plans."""

from pathlib import Path

import pytest

from sdtrain.plan import measured
from sdtrain.plan.measured import read_measured, record_measured
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
