"""Checks third-party networks: loads each as the run will, and uses it once."""

from __future__ import annotations

from functools import lru_cache

from sdtrain.errors import UserError

_SIDE_PX = 64
_CAPTION = "a photograph"


@lru_cache  # runs of a chain share networks
def check_vae(name: str) -> str:
    """Encodes and decodes a small image.

    UserError if there is no such VAE, or its latents are not four channels of an eighth of the image's side.
    """
    import torch

    from sdtrain.formats.frozen import load_vae, vae_digest, vae_scaling_factor
    from sdtrain.models.unet import LATENT_CHANNELS

    vae, digest, factor = load_vae(name), vae_digest(name), vae_scaling_factor(name)
    with torch.inference_mode():
        moments = vae.encode(torch.zeros(1, 3, _SIDE_PX, _SIDE_PX)).latent_dist.parameters
        expected = (1, 2 * LATENT_CHANNELS, _SIDE_PX // 8, _SIDE_PX // 8)
        if tuple(moments.shape) != expected:
            raise UserError(
                f"The VAE '{name}' makes {moments.shape[1] // 2} channels of {moments.shape[3]} x {moments.shape[2]} "
                f"from {_SIDE_PX} x {_SIDE_PX} pixels; Stable Diffusion v1 has {LATENT_CHANNELS} of an eighth of the "
                "side. Name SD v1's, or another one of its form."
            )
        decoded = vae.decode(moments[:, :LATENT_CHANNELS]).sample
    if not (moments.isfinite().all() and decoded.isfinite().all()):
        raise UserError(f"The VAE '{name}' gives numbers that are not finite; its weights are damaged.")
    return f"{name}: VAE, scaling factor {factor:g}, sha256 {digest[:12]}"


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
    if width not in (None, config.hidden_size):
        raise UserError(
            f"The text encoder '{name}' gives {config.hidden_size} features, but unet.cross_attention_dim is {width}. "
            "Set one to the other."
        )
    with torch.inference_mode():
        encoded = encoder(tokenize(tokenizer, [_CAPTION])).last_hidden_state
    if not encoded.isfinite().all():
        raise UserError(f"The text encoder '{name}' gives numbers that are not finite; its weights are damaged.")
    return f"{name}: CLIP text encoder, {config.num_hidden_layers} layers, width {config.hidden_size}, tokenizer"
