"""Encoder of captions and images: the network that scored a dataset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from filters.recipe import ScoreConfig
from filters.search.index import IndexInfo
from sdtrain.errors import UserError
from sdtrain.models.clip import clip_preprocess, clip_view, load_clip, normalised, pixels_of
from sdtrain.models.weights import RANDOM, RANDOM_FULL, clip_digest

_BATCH = 32


class Encoder:
    """CLIP as configured by a dataset's recipe, for comparison with the embeddings of index `info`.

    Raises:
        UserError: the recipe names other weights than the dataset was scored with, or they are unavailable.
    """

    def __init__(self, config: ScoreConfig, info: IndexInfo) -> None:
        weights = config.clip_weights
        if weights is None or (config.clip_model, clip_digest(config.clip_model, weights)) != (
            info.clip_model,
            info.clip_digest,
        ):
            raise UserError(
                f"The dataset was scored with CLIP {info.clip_model} ({info.clip_digest}), and its recipe.yaml names "
                f"{config.clip_model} ({weights}). Run `sdtrain build` again, which scores again, or undo the recipe."
            )
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        network, self._tokenizer = load_clip(config.clip_model, weights)
        self._preprocess = clip_preprocess(network, config.clip_model, weights)
        self._network = network.to(self._device)

    @torch.inference_mode()
    def captions(self, captions: Sequence[str]) -> NDArray[np.float32]:
        """Returns unit vectors (N, D)."""
        return _unit(self._network.encode_text(self._tokenizer(list(captions)).to(self._device)))

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Returns unit vectors (N, D) of RGB images."""
        found = []
        for first in range(0, len(images), _BATCH):
            views = [pixels_of(clip_view(image, self._preprocess)) for image in images[first : first + _BATCH]]
            inputs = normalised(torch.stack(views).to(self._device), self._preprocess.mean, self._preprocess.std)
            found.append(_unit(self._network.encode_image(inputs)))
        return np.concatenate(found)


def is_stand_in(config: ScoreConfig) -> bool:
    """Returns whether CLIP has random weights: then equal images are similar, and captions are similar to nothing."""
    return (config.clip_weights or "").startswith((RANDOM, RANDOM_FULL))


def _unit(embeddings: torch.Tensor) -> NDArray[np.float32]:
    normal: NDArray[np.float32] = torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy()
    return normal
