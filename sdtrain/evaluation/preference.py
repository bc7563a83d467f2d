"""How much people would prefer an image for its prompt, as a CLIP that was trained on their choices predicts.

The network is PickScore's (Kirstain et al. 2023, arXiv:2305.01569; `yuvalkirstain/PickScore_v1`), or any other CLIP in
transformers' format: a folder with model.safetensors, and tokenizer and preprocessor beside it. HPSv3 and ImageReward
are not used: the package of the one needs an older transformers, and that of the other unpickles what it downloads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from sdtrain.dataset.files import sha256_of
from sdtrain.errors import UserError
from sdtrain.models.device import claim_device

BATCH_SIZE = 32
_WEIGHTS = "model.safetensors"
_NEEDED = (_WEIGHTS, "config.json", "preprocessor_config.json")
_FILES = (*_NEEDED, "tokenizer*", "vocab.json", "merges.txt", "special*.json")


class _Network(NamedTuple):
    model: Any
    tokenizer: Any
    image_processor: Any


def preference_digest(name: str) -> str:
    """Identifies network, tokenizer and preprocessing of a folder or hub id; UserError if there is none."""
    return _digest(find_preference(name))


def find_preference(name: str) -> Path:
    """The folder of a folder's name or a hub id, fetched if needed; UserError if it lacks a file."""
    from sdtrain.formats.hub import snapshot

    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(f"There is no folder {folder} with a preference network. Name one, or a hub id.")
        folder = snapshot(name, "preference network", list(_FILES))
    missing = [file for file in _NEEDED if not (folder / file).exists()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}: a preference network is a CLIP in transformers' format, with "
            "weights in safetensors and its tokenizer and preprocessor beside it."
        )
    return folder


def check_preference(name: str) -> str:
    """Loads the network once on the CPU, as a check; UserError if it cannot be loaded."""
    _read(find_preference(name))
    return name


def preference_scores(images: Sequence[Image.Image], texts: Sequence[str], name: str) -> Tensor:
    """(n,) float32: the cosine of each image with its prompt, times the network's scale, about 100.

    Texts longer than the network reads are truncated. UserError if there is no such network, or scores are not finite.
    """
    network, device = _on_device(find_preference(name)), claim_device()
    num_tokens = network.model.config.text_config.max_position_embeddings
    parts = []
    for first in range(0, len(images), BATCH_SIZE):
        some = slice(first, first + BATCH_SIZE)
        inputs = network.tokenizer(
            list(texts[some]), padding=True, truncation=True, max_length=num_tokens, return_tensors="pt"
        )
        inputs |= network.image_processor(list(images[some]), return_tensors="pt")
        with torch.inference_mode():
            found = network.model(**{key: value.to(device) for key, value in inputs.items()})
            cosines = (found.image_embeds * found.text_embeds).sum(dim=1)
            parts.append((network.model.logit_scale.exp() * cosines).float().cpu())
    scores = torch.cat(parts)
    if not scores.isfinite().all():
        raise UserError(f"The scores of preference network '{name}' are not finite: its weights are damaged.")
    return scores.clone()  # out of inference mode


@lru_cache(maxsize=1)
def _on_device(folder: Path) -> _Network:
    network = _read(folder)
    return network._replace(model=network.model.to(claim_device()))


def _read(folder: Path) -> _Network:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    try:
        config = CLIPConfig.from_pretrained(folder, local_files_only=True)
        model = CLIPModel(config)
        found = model.load_state_dict(load_file(folder / _WEIGHTS), strict=False)
        processors = [
            kind.from_pretrained(folder, local_files_only=True) for kind in (CLIPTokenizer, CLIPImageProcessor)
        ]
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder} holds no CLIP that can be read: {error}") from error
    if found.missing_keys:
        num, first = len(found.missing_keys), found.missing_keys[0]
        raise UserError(f"{folder / _WEIGHTS} lacks {num:,} tensors of its config's network, such as {first}.")
    return _Network(model.eval().requires_grad_(False), *processors)


@lru_cache
def _digest(folder: Path) -> str:
    files = sorted(path for pattern in _FILES for path in folder.glob(pattern))
    named = {path.name: sha256_of(path) for path in files}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
