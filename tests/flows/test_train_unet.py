import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.logging import disable_run_logger

from flows import train_unet
from sdtrain.errors import UserError

FAKE = """
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("config", "data", "output", "steps"):
    parser.add_argument(f"--{name}")
arguments = parser.parse_args()
print("accelerator", os.environ.get("DS_ACCELERATOR"))
print(f"step 3/{arguments.steps}  loss 0.1")
"""
DONE = "pathlib.Path(arguments.output, 'DONE').write_text(json.dumps({'step': %s}))\n"


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains with a script of the test, started by plain Python; no Prefect server."""
    shown: list[int] = []
    monkeypatch.setattr(train_unet, "_launcher", lambda num_gpus: [sys.executable])
    monkeypatch.setattr(train_unet, "ProgressArtifact", lambda *_: nullcontext(SimpleNamespace(show=shown.append)))

    def run(body: str, steps: int = 5) -> SimpleNamespace:
        (tmp_path / "fake.py").write_text(FAKE + body)
        with disable_run_logger():
            path = train_unet.train("tiny", "data", str(tmp_path / "run"), steps, script=tmp_path / "fake.py")
        return SimpleNamespace(path=path, shown=shown)

    return run


def test_marker_with_the_last_step_is_success(train: Any, tmp_path: Path) -> None:
    done = train(DONE % "5")
    assert done.path == str(tmp_path / "run")
    assert done.shown == [3]
    assert "accelerator" in (tmp_path / "run" / "console.log").read_text()


def test_exit_code_0_without_the_marker_is_failure_and_shows_the_last_lines(train: Any) -> None:
    with pytest.raises(UserError, match=r"ended before step 5 \(exit code 0\)[\s\S]*step 3/5  loss 0.1"):
        train("")


def test_marker_of_an_earlier_step_is_failure(train: Any) -> None:
    with pytest.raises(UserError, match="ended before step 5"):
        train(DONE % "4")


def test_marker_of_an_earlier_run_does_not_hide_a_failure(train: Any) -> None:
    train(DONE % "5")
    with pytest.raises(UserError, match=r"ended before step 6 \(exit code 2\)[\s\S]*error: no latents"):
        train("print('error: no latents'); sys.exit(2)", steps=6)


def test_a_finished_run_is_not_started_again(train: Any) -> None:
    train(DONE % "5")
    assert train("sys.exit('must not run')").shown == [3]


def test_unknown_config_is_a_sentence(train: Any) -> None:
    with pytest.raises(UserError, match="Did you mean 'tiny'"):
        train_unet.train("tinny", "data")


def test_without_gpus_the_launcher_gets_cpu_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_unet, "_has_gpu", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert train_unet._environment() == {"DS_ACCELERATOR": "cpu"}
    assert train_unet._launcher(None)[-2:] == ["--num_gpus", "1"]
    assert train_unet._launcher(2)[-2:] == ["--num_gpus", "2"]


def test_with_gpus_all_are_taken_and_nothing_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_unet, "_has_gpu", lambda: True)
    assert train_unet._environment() == {}
    assert "--num_gpus" not in train_unet._launcher(None)
    assert train_unet._launcher(4)[-2:] == ["--num_gpus", "4"]


def test_launcher_is_the_one_of_this_environment() -> None:
    assert os.access(train_unet._launcher(1)[0], os.X_OK)
