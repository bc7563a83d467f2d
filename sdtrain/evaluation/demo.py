"""The demo's evaluation: its tiny model over guidance scales, by its own tiny network and its checker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sdtrain.dataset.files import publish
from sdtrain.demo.images import COLORS, SHAPES
from sdtrain.evaluation.protocol import Protocol
from sdtrain.evaluation.results import Results
from sdtrain.evaluation.sweep import plan
from sdtrain.evaluation.workers import run_sweep

SCALES = (1.0, 2.0, 3.0, 5.0, 8.0)
NUM_STEPS, NUM_EACH = 25, 2
_NUM_REFERENCE = 500


def evaluate_demo(
    models: Sequence[Path], data: Path, output: Path, say: Callable[[str], None] = print
) -> tuple[Results, Path]:
    """Draws every colour with every shape twice at each guidance scale; what was finished before is kept.

    Args:
        models: the demo's runs or exports, a line each in the plot.
        data: its dataset, whose images are the reference.
        output: where the evaluation goes, for a single run best `RUN/evaluation`.
        say: hears a line when a step has ended.

    Returns:
        The numbers, whose names say that they are the demo's, and the plot's file.

    Raises:
        UserError: no model, or no images.
    """
    sweep = plan(demo_protocol(data, output), models, output)
    return run_sweep(sweep, say=say), sweep.directory.curve


def demo_protocol(data: Path, output: Path) -> Protocol:
    """The settings; the prompts are written into the evaluation's directory."""
    prompts = output.absolute() / "demo-prompts.txt"
    lines = [f"a {color} {shape}\n" for color in COLORS for shape in SHAPES] * NUM_EACH
    with publish(prompts) as temporary:
        temporary.write_text("".join(lines))
    return Protocol(
        prompts=str(prompts),
        num_prompts=len(lines),
        reference=str(data),
        num_reference=_NUM_REFERENCE,
        scales=SCALES,
        num_steps=NUM_STEPS,
        batch_size=len(lines),
        part_size=len(lines),
        network="demo",
        agreement="demo",
    )
