"""Makes the demo's tiny text encoder and tokenizer; they ship in `sdtrain/demo/weights`.

    python -m sdtrain.demo.text_encoder --out sdtrain/demo/weights

The encoder is a frozen CLIP with random weights. Nothing has to be learnt: each demo word is one token, and their
embeddings are orthogonal, so the UNet can distinguish words.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdtrain.demo.images import BACKGROUNDS, COLORS, SHAPES

MAX_TOKENS = 16
HIDDEN = 64
_WORDS = ("a", "on", "of", "picture", "background", *COLORS, *SHAPES, *BACKGROUNDS)
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
# Small beside the words' 1, so that a word's meaning hardly depends on its position.
_POSITION_STD = 0.1


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with merges for the demo's words; other text becomes bytes.

    The vocabulary has CLIP's order: bytes, word-final bytes, merges, start, end.
    """
    alphabet, merges = sorted(ByteLevel.alphabet()), word_merges(_WORDS)
    tokens = [*alphabet, *(byte + _WORD_END for byte in alphabet), *("".join(pair) for pair in merges), _START, _END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=cast(Any, merges), model_max_length=MAX_TOKENS, pad_token=_END)


def word_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each ASCII word one token; the trainer of `tokenizers` breaks ties at random."""
    spellings = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    merges = []
    while pairs := Counter(pair for spelling in spellings for pair in pairwise(spelling)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spellings = [_merged(spelling, best) for spelling in spellings]
    return merges


def _merged(spelling: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for token in spelling:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def build_text_encoder(tokenizer: CLIPTokenizer, seed: int = 0) -> CLIPTextModel:
    """A random `CLIPTextModel` with orthogonal embeddings of whole words."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        projection_dim=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPTextModel(config).eval()
        tokens, positions = model.get_input_embeddings().weight, model.embeddings.position_embedding.weight
        torch.nn.init.normal_(tokens)
        torch.nn.init.normal_(positions, std=_POSITION_STD)
        vocab = tokenizer.get_vocab()
        words = [vocab[token] for token in (*(word + _WORD_END for word in (*_WORDS, ",")), _START, _END)]
        # Orthogonal columns, scaled to the length of a unit-variance vector.
        directions = torch.nn.init.orthogonal_(torch.empty(HIDDEN, HIDDEN)) * HIDDEN**0.5
        with torch.no_grad():
            tokens[words] = directions[: len(words)]
    return model


def main() -> None:
    """Writes `tokenizer/` and `text_encoder/` into the folder that --out names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(args.out / "tokenizer")
    # vocab.json and merges.txt, for readers older than tokenizer.json.
    tokenizer.backend_tokenizer.model.save(str(args.out / "tokenizer"))
    build_text_encoder(tokenizer, args.seed).save_pretrained(args.out / "text_encoder")


if __name__ == "__main__":
    main()
