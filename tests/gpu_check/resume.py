"""Stage `resume`: a tiny run is killed and goes on; its losses and weights next to those of an undisturbed one."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from sdtrain.formats.checkpoint import find_checkpoint
from tests.benchmarks.training_loops import CUDA
from tests.gpu_check.child import Check
from tests.sdtrain.launching import SCRIPT, finish, free_port, log_of, start, wait_for_step
from tests.training_fixtures import write_config, write_latents, write_models

STEPS, EVERY = (60, 10) if CUDA else (24, 6)
SLOW_DISK_S = 1.0
"""A checkpoint's write takes this long, and the next one waits for it: the kill finds the run at work."""
WATCHED = "tests/sdtrain/watched_train.py"


def kill_and_compare(check: Check) -> None:
    models = write_models(check.work / "resume" / "models")
    data = write_latents(check.work / "resume" / "data", models)
    num_ranks = torch.cuda.device_count() if CUDA else 1
    check.record(ranks=num_ranks, backend="nccl" if CUDA else "gloo", steps=STEPS)
    for is_deterministic in (True, False) if CUDA else (True,):  # a CPU repeats itself in any case
        folder = check.work / "resume" / ("deterministic" if is_deterministic else "default")
        folder.mkdir()
        changes = {"speed": {"deterministic": is_deterministic}, "checkpoint": {"every": EVERY, "keep_last": 2}}
        config = write_config(folder / "c.yaml", models, data, steps=STEPS, **changes)
        with ThreadPoolExecutor(2) as pool:
            undisturbed = pool.submit(_train, _deepspeed(num_ranks), config, folder / "undisturbed")
            killed = pool.submit(_kill_and_resume, num_ranks, config, folder / "killed")
            undisturbed.result()
            resumed_from = killed.result()
        difference = _difference(folder / "undisturbed", folder / "killed")
        check.record(**{folder.name: {"resumed_from": resumed_from, **difference}})
        if is_deterministic:
            check.expect(difference["is_bit_equal"], "speed.deterministic: the resumed run is another one")


# By their modules: their commands may not be on the path.
def _deepspeed(num_ranks: int) -> list[object]:
    module = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*module, "--num_gpus", num_ranks, "--master_port", free_port(), SCRIPT]


def _torchrun(num_ranks: int, script: str = SCRIPT) -> list[object]:
    module = [sys.executable, "-m", "torch.distributed.run"]
    return [*module, "--nproc-per-node", num_ranks, "--master-port", free_port(), script]


def _start(launcher: list[object], config: Path, output: Path, **environment: str) -> Any:
    accelerator = {"DS_ACCELERATOR": "cuda"} if CUDA else {}
    return start(launcher, config, output, **accelerator, **environment)


def _train(launcher: list[object], config: Path, output: Path) -> str:
    code, text = finish(_start(launcher, config, output))
    assert code == 0, text[-4000:]
    return text


def _kill_and_resume(num_ranks: int, config: Path, output: Path) -> int:
    """Kills all processes once there is a checkpoint, and starts again; returns the step that it went on from."""
    process = _start(_torchrun(num_ranks, WATCHED), config, output, SLOW_DISK_S=str(SLOW_DISK_S))
    wait_for_step(process, output, EVERY)
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        member.kill()  # one by one: torchrun gives each rank a session of its own
    finish(process)
    assert not (output / "DONE").exists(), "the run had ended before it was killed"
    step = find_checkpoint(output).layout.step
    text = _train(_torchrun(num_ranks), config, output)
    assert f"from step {step} " in text, text[-4000:]
    return step


def _difference(one: Path, other: Path) -> dict[str, Any]:
    checkpoints = [find_checkpoint(output) for output in (one, other)]
    weights = [_flat(checkpoint) for checkpoint in checkpoints]
    losses = [[float(loss) for loss in log_of(output)] for output in (one, other)]
    return {
        "is_bit_equal": checkpoints[0].layout.files == checkpoints[1].layout.files and losses[0] == losses[1],
        "weights_relative": float((weights[0] - weights[1]).norm() / weights[0].norm()),
        "loss_largest": max(abs(a - b) for a, b in zip(*losses, strict=True)),
    }


def _flat(checkpoint: Any) -> torch.Tensor:
    return torch.cat([values.reshape(-1) for _, values in checkpoint.weights("master")])
