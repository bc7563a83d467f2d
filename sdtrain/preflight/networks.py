"""Checks a third-party text encoder: loads it as the run will, and uses it once."""

from __future__ import annotations

from functools import lru_cache

from sdtrain.errors import UserError

_CAPTION = "a photograph"


@lru_cache
def check_text_encoder(name: str, width: int | None = None) -> str:
    """Tokenizes and encodes a caption; compares the width with that of the UNet's cross-attention, if given.

    UserError if there is no such text encoder or tokenizer, or it does not fit the other or the UNet.
    """
    import torch

    from sdtrain.formats.frozen import load_text_encoder
    from sdtrain.models.text import tokenize

    tokenizer, encoder = load_text_encoder(name)
    config = encoder.config
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"The tokenizer of '{name}' has {len(tokenizer)} tokens, but its text encoder knows {config.vocab_size}. "
            "Put those together that belong together."
        )
    if width is not None:
        require_width(name, config.hidden_size, width)
    with torch.inference_mode():
        encoded = encoder(tokenize(tokenizer, [_CAPTION])).last_hidden_state
    if not encoded.isfinite().all():
        raise UserError(f"The text encoder '{name}' gives numbers that are not finite; its weights are damaged.")
    return f"{name}: CLIP text encoder, {config.num_hidden_layers} layers, width {config.hidden_size}, tokenizer"


def require_width(name: str, num_features: int, width: int) -> None:
    """Raises UserError unless text encoder `name` gives as many features as the UNet's cross-attention takes."""
    if num_features != width:
        raise UserError(
            f"The text encoder '{name}' gives {num_features} features, but unet.cross_attention_dim is {width}. Set "
            "one to the other."
        )
