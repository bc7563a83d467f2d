"""Stand-ins for Inception and CLIP (`networks` or `agreement`: `demo`) that work offline, and the demo's evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdtrain.dataset.files import publish
from sdtrain.demo.checker import classify
from sdtrain.demo.images import COLORS, SHAPES
from sdtrain.errors import UserError
from sdtrain.evaluation.metric import Arrays, Metric
from sdtrain.evaluation.metrics import mean_of
from sdtrain.evaluation.networks import FeatureNetwork
from sdtrain.evaluation.protocol import Protocol
from sdtrain.evaluation.results import Results
from sdtrain.evaluation.sweep import plan
from sdtrain.evaluation.workers import run_sweep
from sdtrain.formats.digests import vae_digest
from sdtrain.formats.frozen import load_vae
from sdtrain.models.clip import pixels_of
from sdtrain.options import Resize

SCALES = (1.0, 2.0, 3.0, 5.0, 8.0)
NUM_STEPS, NUM_EACH = 25, 2
_NUM_REFERENCE = 500


class _Encoder(nn.Module):
    """Spatial means of the demo autoencoder's activations before its last convolution, (B, 96)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = load_vae("demo").encoder

    def forward(self, views: Tensor) -> Tensor:
        hidden: Tensor = self.encoder.conv_in(views)
        for block in self.encoder.down_blocks:
            hidden = block(hidden)
        hidden = torch.nn.functional.silu(self.encoder.conv_norm_out(self.encoder.mid_block(hidden)))
        return hidden.mean(dim=(2, 3))


class DemoFeatures(FeatureNetwork):
    """The demo's autoencoder."""

    num_features = 96
    description = "96 features of the demo's own tiny autoencoder, comparable with nothing else"
    suffix = "_demo_features"
    label = " of the demo's own features"

    def digest(self, weights: str) -> str:
        """The demo VAE's digest."""
        return vae_digest("demo")

    def load(self, weights: str) -> nn.Module:
        """The network in eval mode."""
        return _Encoder()

    def view(self, image: Image.Image, resize: Resize) -> Tensor:
        """(3, 64, 64), from -1 to 1."""
        small = image.resize((64, 64), Image.Resampling.BICUBIC)
        return pixels_of(small).permute(2, 0, 1).float() / 127.5 - 1


class CheckerAgreement(Metric):
    """The share of named colours and shapes that the demo's checker sees."""

    name, better = "agreement_demo_checker", "higher"
    description = "share of named colours and shapes that the demo's checker sees; not a CLIP score"
    drawn = ("shown",)
    axis, label = "x", "named colours and shapes that the demo's checker sees"

    def measure(self, drawn: Arrays, captions: Arrays) -> tuple[float, float]:
        """The mean over the images."""
        return mean_of(drawn["shown"])


FEATURES, AGREEMENT = DemoFeatures(), CheckerAgreement


def score_images(images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
    """(n,) float32: the share of a prompt's colour and shape that its image shows, 0, 0.5 or 1.

    UserError if a prompt names no colour or no shape of the demo's.
    """
    scores = []
    for image, text in zip(images, texts, strict=True):
        words = text.replace(",", " ").split()
        wanted = next((w for w in words if w in COLORS), None), next((w for w in words if w in SHAPES), None)
        if None in wanted:
            raise UserError(f"The demo's checker needs a colour and a shape in each prompt; '{text}' lacks one.")
        verdict = classify(image)
        scores.append(np.mean([verdict.color == wanted[0], verdict.shape == wanted[1]]))
    return torch.tensor(scores, dtype=torch.float32)


def evaluate_demo(
    models: Sequence[Path], data: Path, output: Path, say: Callable[[str], None] = print
) -> tuple[Results, Path]:
    """Draws every colour with every shape twice at each guidance scale; finished parts are kept.

    The images of `data` are the reference. Returns the numbers, with names marked as the demo's, and the plot.
    UserError if there is no model, or no images.
    """
    sweep = plan(demo_protocol(data, output), models, output)
    return run_sweep(sweep, say=say), sweep.directory.curve


def demo_protocol(data: Path, output: Path) -> Protocol:
    """The settings; writes the prompts to the evaluation's directory."""
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
        networks=("demo",),
        agreement="demo",
    )
