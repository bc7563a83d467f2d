"""Counts CLIP's tokens of captions by the vocabulary that open_clip carries, so that no weights are needed."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENS = 77
"""What CLIP's text encoder reads, the start and the end token included."""
_MERGES = slice(1, 49152 - 256 - 2 + 1)  # behind a line with the file's version; the rest belongs to a larger one
_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def count_tokens(texts: Sequence[str]) -> list[int]:
    """The number of tokens of each text, the start and the end token included: CLIP reads all of it up to 77."""
    return [len(encoding.ids) for encoding in _tokenizer().encode_batch_fast(list(texts))]


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    """CLIP's tokenizer as training uses it; the numbers of its tokens are in another order, which changes no count."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet, merges = ByteLevel.alphabet(), _merges()
    tokens = [*alphabet, *(byte + _WORD_END for byte in alphabet), *("".join(pair) for pair in merges), _START, _END]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    backend: Tokenizer = CLIPTokenizer(vocab=vocab, merges=merges).backend_tokenizer
    return backend


def _merges() -> list[tuple[str, str]]:
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise AssertionError("open_clip is a dependency")
    with gzip.open(Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[_MERGES]
    return [(first, second) for first, second in (line.split() for line in lines)]
