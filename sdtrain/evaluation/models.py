"""The models under evaluation, identified by their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdtrain.errors import UserError
from sdtrain.evaluation.protocol import Protocol
from sdtrain.formats.any_model import is_run, open_model
from sdtrain.formats.model_digest import digest_model
from sdtrain.formats.stored_model import StoredModel, latent_shape
from sdtrain.models.schedulers import check_num_steps


@dataclass(frozen=True)
class EvaluatedModel:
    """A run, checkpoint, diffusers folder or CompVis file at `path`.

    `digest` is the sha256 of UNet, VAE, text encoder and noise schedule, equal for any file with the same weights in
    the same precision; `text_encoder` that of text encoder and tokenizer.
    """

    path: Path
    label: str
    digest: str
    text_encoder: str
    size_px: int

    @property
    def key(self) -> str:
        """Its name in file names."""
        return self.digest[:12]


def identify(path: Path, protocol: Protocol) -> EvaluatedModel:
    """Reads all weights once; UserError if there is no such model, or it lacks these weights."""
    model = open_model(path, protocol.tokenizer)
    check_num_steps(protocol.sampler, model.scheduler_config, protocol.num_steps)
    frozen = model.frozen()
    digest = digest_model(model, protocol.weights, frozen)
    step = f", step {model.step:,}" if model.step else ""
    return EvaluatedModel(
        path=path,
        label=f"{_name(path)}{step}{', raw' if protocol.weights == 'raw' else ''}",
        digest=digest.whole,
        text_encoder=digest.text_encoder,
        size_px=_side(model) * 2 ** (len(frozen.vae.config.block_out_channels) - 1),
    )


def _side(model: StoredModel) -> int:
    height, width = latent_shape(model.unet_config["sample_size"])
    if height != width:
        raise UserError(f"{model.source} draws {width} x {height} latents; only models of squares can be evaluated.")
    return height


def identify_all(paths: Sequence[Path], protocol: Protocol) -> list[EvaluatedModel]:
    """Identifies all models and gives each a unique label.

    UserError as for `identify`, and for none, duplicates, or models of different image sizes.
    """
    models = [identify(path, protocol) for path in paths]
    for i, model in enumerate(models):
        for before in models[:i]:
            if before.digest == model.digest:
                raise UserError(f"{before.path} and {model.path} are the same model; name one of them.")
            if before.size_px != model.size_px:
                raise UserError(
                    f"{before.path} makes images of {before.size_px} pixels and {model.path} of {model.size_px}, so "
                    "their numbers cannot be compared. Evaluate them apart."
                )
    if not models:
        raise UserError("There is no model to evaluate. Name a run, a checkpoint, a diffusers folder or a file.")
    labels = [model.label for model in models]
    return [replace(m, label=f"{m.label} ({m.key[:6]})") if labels.count(m.label) > 1 else m for m in models]


def run_of(path: Path) -> Path | None:
    """The run that a model is or is part of."""
    if not is_run(path):
        return None
    return path if (path / "checkpoints").is_dir() else path.resolve().parents[1]


def _name(path: Path) -> str:
    path = (run_of(path) or path).resolve()
    return path.stem if path.is_file() else path.name
