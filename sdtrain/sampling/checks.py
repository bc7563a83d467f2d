"""Checks what is asked of a model before its networks are loaded, and says what should be known about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import CLIPTokenizer

from sdtrain.formats.stored_model import PIXELS_PER_LATENT, StoredModel, latent_shape
from sdtrain.models.schedulers import check_num_steps
from sdtrain.models.text import truncated_part
from sdtrain.sampling.sampler import SampleSettings

_NUM_SHOWN = 3


def check_settings(model: StoredModel, settings: SampleSettings) -> str:
    """The images' size beside that of the training images; UserError if the sampler cannot take so many steps."""
    check_num_steps(settings.sampler, model.scheduler_config, settings.num_steps)
    height, width = (side * PIXELS_PER_LATENT for side in latent_shape(model.unet_config["sample_size"]))
    size = settings.width or width, settings.height or height
    asked = f"Images of {size[0]} x {size[1]} px"
    sizes = [f"{width} x {height}" for width, height in model.trained_px[:_NUM_SHOWN]]
    more = f" and {len(model.trained_px) - _NUM_SHOWN} sizes more" if len(model.trained_px) > _NUM_SHOWN else ""
    if not sizes:
        own = "" if size == (width, height) else f", not of {width} x {height}"
        return f"{asked}{own}: sample_size of its UNet's config, for {model.source} does not record its training size."
    if size in model.trained_px:
        return f"{asked}, the size that {model.source} was trained on." if not more else f"{asked}, one of its buckets."
    return f"warning: {asked}, but {model.source} was trained on {', '.join(sizes)}{more}: expect worse ones."


def truncation_warnings(tokenizer: CLIPTokenizer, prompts: Sequence[str], what: str = "prompt") -> Iterator[str]:
    """A line for each of the first prompts that are longer than the text encoder reads, and one for all others."""
    parts = [(prompt, part) for prompt in dict.fromkeys(prompts) if (part := truncated_part(tokenizer, prompt))]
    for prompt, part in parts[:_NUM_SHOWN]:
        yield (
            f"warning: the {what} “{_shortened(prompt)}” has more than the {tokenizer.model_max_length} tokens that "
            f"the text encoder reads; it does not see “{part}”."
        )
    if len(parts) > _NUM_SHOWN:
        yield f"warning: {len(parts) - _NUM_SHOWN} more {what}s are longer than the text encoder reads."


def _shortened(text: str, num: int = 40) -> str:
    return text if len(text) <= num else f"{text[:num].rstrip()} …"
