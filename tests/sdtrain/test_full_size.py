"""SD v1's own UNet takes a real optimizer step, with everything that belongs to it, on a machine without a GPU."""

import math
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

MAX_MEMORY_GB = 22
"""Weights, gradients, master weights, Adam's moments and the average are 20 GB; measured: 21.2 GB."""

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(psutil.virtual_memory().total < MAX_MEMORY_GB * 1e9, reason="needs 22 GB of memory"),
]


def test_the_full_unet_takes_an_optimizer_step_with_all_its_state(tmp_path):
    command = [sys.executable, __file__, str(tmp_path)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == 0, ended.stderr[-3000:]
    print(ended.stdout)
    figures = dict(line.split("=") for line in ended.stdout.splitlines() if "=" in line)
    assert int(figures["parameters"]) == 859_520_964
    # Its output layer begins at zero, so it predicts 0, whose error is the noise's variance.
    assert math.isclose(float(figures["loss"]), 1.0, abs_tol=0.35)
    assert float(figures["grad_norm"]) > 0
    assert math.isclose(float(figures["largest_change"]), 1e-4, rel_tol=0.05), "Adam's first step moves by the rate"
    assert math.isclose(float(figures["largest_change_of_average"]), 0.9e-4, rel_tol=0.05), "decay (1 + 0) / (10 + 0)"
    assert float(figures["memory_gb"]) < MAX_MEMORY_GB


def main(folder: Path) -> None:
    """The step, in a process of its own, so that its memory can be told and is given back."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from transformers import CLIPTextConfig, CLIPTextModel

    from sdtrain.config import UNetConfig, load_config
    from sdtrain.training.distributed import join
    from sdtrain.training.optimizer import learning_rate, set_learning_rate
    from sdtrain.training.run_dir import RunDir
    from sdtrain.training.state import TrainingState
    from tests.training_fixtures import write_config, write_latents, write_models

    models = write_models(folder / "models")
    text = CLIPTextConfig.from_pretrained(models / "text_encoder")
    text.update({"hidden_size": 768, "num_attention_heads": 12})
    CLIPTextModel(text).save_pretrained(models / "text_encoder")
    data = write_latents(folder / "data", models, num_samples=2)
    changes = {"unet": UNetConfig().model_dump(), "global_batch_size": 1, "micro_batch_size": 1}
    changes |= {"speed": {"fp32_gradients": False}}  # 3.4 GB, which the 22 do not have; one micro-batch adds nothing up
    changes |= {"optimizer": {"lr": 1e-4}, "schedule": {"warmup_steps": 0}, "ema": {"decay": 0.9999}}
    config, ranks = load_config(str(write_config(folder / "c.yaml", models, data, **changes))), join(None)

    state = TrainingState(config, RunDir(folder / "run"), ranks)
    set_learning_rate(state.engine.optimizer, learning_rate(0, config.optimizer, config.schedule))
    batches = state.batches(0)
    for batch in state.micro_batches(batches):
        weighted, unweighted = state.losses(batch)
        state.engine.backward(weighted.mean())
        state.engine.step()
    batches.close()
    print(f"parameters={state.engine.module.num_parameters()}")
    print(f"loss={float(unweighted.detach().mean())}")
    print(f"grad_norm={state.grad_norm()}")
    slot = state.partition.slots[-1]  # the last bias, which begins at zero and so does not decay
    part = slice(slot.offset, slot.offset + slot.numel)
    print(f"largest_change={float(state.partition.master[part].detach().abs().max())}")
    print(f"largest_change_of_average={float(state.ema.average[part].detach().abs().max())}")
    print(f"memory_gb={resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f}")
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
