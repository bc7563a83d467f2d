"""Runs the frozen text encoder: captions to the embeddings that training may read instead of computing them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdtrain.errors import UserError
from sdtrain.precision import torch_dtype

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

TextDtype = Literal["fp16", "bf16"]

_ONE_AT_A_TIME = Lock()


@dataclass(frozen=True)
class TextEmbedder:
    """A text encoder with its tokenizer; embeddings are (B, L, width), stored as the bits of `dtype`.

    In bf16 the network computes as bf16 training does, so a cached embedding is the one computed online, to the bit
    where the matrix products do not depend on the batch's size. In fp16 it computes in fp32 and rounds.
    """

    tokenizer: CLIPTokenizer
    encoder: CLIPTextModel
    dtype: TextDtype

    def __call__(self, captions: Sequence[str]) -> NDArray[np.uint16]:
        """The captions' embeddings; UserError if `dtype` cannot hold them."""
        import torch

        from sdtrain.models.text import tokenize

        token_ids = tokenize(self.tokenizer, captions).to(self.encoder.device)
        with _ONE_AT_A_TIME, torch.inference_mode():
            found = self.encoder(token_ids).last_hidden_state.to("cpu", torch_dtype(self.dtype))
        if not found.isfinite().all():
            raise UserError(f"The text encoder gives numbers that {self.dtype} cannot hold; store bf16.")
        bits: NDArray[np.uint16] = found.contiguous().view(torch.uint16).numpy()
        return bits

    @property
    def shape(self) -> tuple[int, int]:
        """Of one embedding: tokens and width."""
        return int(self.tokenizer.model_max_length), int(self.encoder.config.hidden_size)


def shared_text_embedder(name: str, dtype: TextDtype) -> TextEmbedder:
    """This process's copy of a text encoder, on its own GPU or the CPU."""
    from sdtrain.models.device import claim_device

    with _ONE_AT_A_TIME:
        return _loaded(name, str(claim_device()), dtype)


@lru_cache(maxsize=1)
def _loaded(name: str, device: str, dtype: TextDtype) -> TextEmbedder:
    from sdtrain.formats.frozen import load_text_encoder

    tokenizer, encoder = load_text_encoder(name)
    return _embedder(tokenizer, encoder, device, dtype)


def _embedder(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel, device: str | torch.device, dtype: TextDtype
) -> TextEmbedder:
    """Moves the encoder, fp32, to where and in what it computes."""
    import torch

    torch.nn.Module.to(encoder, device, torch.bfloat16 if dtype == "bf16" else torch.float32)
    return TextEmbedder(tokenizer, encoder, dtype)


def embed_empty(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel, device: torch.device, dtype: TextDtype
) -> torch.Tensor:
    """The embedding of the empty caption, (L, width), as stored ones are made; leaves the encoder as it is."""
    return embeddings_of(_embedder(tokenizer, copy.deepcopy(encoder), device, dtype)([""])[0], dtype)


def check_text_embedder(name: str, dtype: TextDtype) -> str:
    """Embeds a caption; UserError if there is no such text encoder, or `dtype` cannot hold its numbers."""
    embedder = shared_text_embedder(name, dtype)
    embedder(["a photograph"])
    return f"{name}: CLIP text encoder, {' x '.join(map(str, embedder.shape))} numbers a caption"


def describe_text(name: str, dtype: TextDtype) -> dict[str, Any]:
    """What training must know of cached embeddings, for latents/info.json."""
    from sdtrain.formats.frozen import text_encoder_digest

    shape = shared_text_embedder(name, dtype).shape
    return {"text_encoder": name, "sha256": text_encoder_digest(name), "dtype": dtype, "shape": list(shape)}


def embeddings_of(bits: NDArray[np.uint16], dtype: TextDtype) -> torch.Tensor:
    """Stored bits as a tensor of `dtype`, sharing their memory."""
    import torch

    return torch.from_numpy(bits).view(torch_dtype(dtype))
