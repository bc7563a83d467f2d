"""The whole check at small size, as it runs where there is no GPU, and without Prefect."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_check.record import read_result
from tests.gpu_check.results import section
from tests.gpu_check.stages import STAGES

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("check")
    command = [sys.executable, "-m", "tests.gpu_check", "--budget", "1500", "--out", folder]
    environment = os.environ | {"PYTHONPATH": f"{without_prefect(folder / 'blocked')}:{REPOSITORY}"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (folder / "log.txt").read_text()[-6000:]
    return read_result(folder)


def without_prefect(folder: Path) -> Path:
    """A folder for PYTHONPATH whose `prefect` cannot be imported, in whichever process."""
    (folder / "prefect").mkdir(parents=True)
    (folder / "prefect" / "__init__.py").write_text("raise ModuleNotFoundError('blocked', name='prefect')\n")
    return folder


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1600)]


def test_every_stage_passes_without_a_gpu(result: dict) -> None:
    assert {stage["name"]: stage["status"] for stage in result["stages"]} == {s.name: "passed" for s in STAGES}
    figures = {stage["name"]: stage["figures"] for stage in result["stages"]}
    assert figures["resume"]["deterministic"]["is_bit_equal"] is True
    assert figures["resume"]["deterministic"]["weights_relative"] == 0
    assert figures["networks"]["bf16 sdpa channels_last"]["prediction"] > 1e-4, "bf16 was not bf16"
    assert {"convolution", "matmul", "norm"} <= set(figures["profile"]["profile"]["by_class_ms"])
    assert "optimizer" in figures["profile"]["last_micro_step_with_optimizer_step"]["by_class_ms"]
    assert "optimizer" not in figures["profile"]["profile"]["by_class_ms"], "two micro-steps before the last"
    assert all("images_per_s" in rung for rung in figures["ladder"]["rungs"].values()), figures["ladder"]["rungs"]
    assert figures["best"]["64px"]["images_per_s"] > 0


def test_its_result_becomes_a_section_of_results(result: dict) -> None:
    text = section(result)
    assert text.startswith("## GPU check: ")
    assert result["command"] in text
    assert "Largest losses against the peak: " in text
    assert "Targets" not in text, "a CPU has none"
