"""Tokenizes captions for CLIP, and finds what it does not read of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTokenizer

# A tokenizer sets its padding before use, so threads must take turns.
_TOKENIZING = threading.Lock()


class CaptionTokens:
    """Tokenizes captions, caching the empty one's token ids."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self._tokenize = partial(tokenize, tokenizer)
        self._empty = self._tokenize([""])

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """Token ids, (B, L) int64."""
        ids = self._empty.repeat(len(captions), 1)
        positions = [position for position, caption in enumerate(captions) if caption]
        if positions:
            ids[positions] = self._tokenize([captions[position] for position in positions])
        return ids


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Token ids, (B, L) int64: truncated (keeping the end token) and padded to the encoder's length."""
    with _TOKENIZING:
        encoded = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    return encoded.input_ids


def truncated_part(tokenizer: CLIPTokenizer, caption: str) -> str:
    """The end of a caption that `tokenize` leaves out, empty if the encoder reads all of it."""
    start = truncated_at(tokenizer, caption)
    return "" if start is None else caption[start:].strip()


def truncated_at(tokenizer: CLIPTokenizer, caption: str) -> int | None:
    """Offset of the first character that `tokenize` leaves out; None if there is none."""
    with _TOKENIZING:
        encoded = tokenizer(caption, return_offsets_mapping=True, verbose=False)
    if len(encoded.input_ids) <= tokenizer.model_max_length:
        return None
    return int(encoded.offset_mapping[tokenizer.model_max_length - 1][0])  # the end token is kept in its place
