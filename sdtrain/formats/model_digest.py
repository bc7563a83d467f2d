"""Identifies a model by its weights, whatever file or folder holds them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sdtrain.formats.stored_model import FrozenModels, StoredModel
from sdtrain.options import Weights


@dataclass(frozen=True)
class ModelDigest:
    """Hex sha256 of a `whole` model (UNet, VAE, text encoder, noise schedule), and of `text_encoder` and tokenizer.

    Both are equal for any file with the same weights in the same precision.
    """

    whole: str
    text_encoder: str


def digest_model(model: StoredModel, weights: Weights, frozen: FrozenModels) -> ModelDigest:
    """Reads all weights once; UserError if they are damaged, or the model has none of this kind."""
    vocabulary = {"vocabulary": frozen.tokenizer.get_vocab(), "max_length": frozen.tokenizer.model_max_length}
    text_encoder = _digest(frozen.text_encoder.state_dict(), vocabulary)
    schedule = {name: value for name, value in model.scheduler_config.items() if not name.startswith("_")}
    parts = [_digest(model.state(weights), schedule), _digest(frozen.vae.state_dict(), None), text_encoder]
    return ModelDigest(hashlib.sha256("".join(parts).encode()).hexdigest(), text_encoder)


def _digest(state: Mapping[str, torch.Tensor], notes: object) -> str:
    digest = hashlib.sha256(json.dumps(notes, sort_keys=True, default=str).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content: Any = tensor.view(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()
