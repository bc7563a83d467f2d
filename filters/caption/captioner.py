"""A local image-to-text model: found, loaded once per process, asked in batches."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from PIL import Image

from filters.caption_config import PROMPTS, CaptionModelConfig
from sdtrain.dataset.files import sha256_of
from sdtrain.endpoint.answers import Answer, kind_of
from sdtrain.errors import UserError
from sdtrain.formats.hub import snapshot
from sdtrain.models.device import claim_device
from sdtrain.precision import resolve, torch_dtype

_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_ONE_AT_A_TIME = Lock()
_TASKS = {"short": "<CAPTION>", "long": "<MORE_DETAILED_CAPTION>"}


class Captioner:
    """A model and its processor on this process's device.

    Three ways of asking are known: a chat with an image, by the processor's template; Florence-2's task names; and, for
    captioners such as BLIP, the first words of the caption, or none.
    """

    def __init__(self, model: Any, processor: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._model = model.to(device=device, dtype=dtype).eval()
        self._processor, self._device, self._dtype = processor, device, dtype
        self._is_chat = bool(getattr(processor, "chat_template", None))
        self._is_florence = model.config.model_type == "florence2"
        # The answers of a batch begin at the same column.
        processor.tokenizer.padding_side = "left" if self._is_chat else "right"

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts of a recipe that names none."""
        return PROMPTS if self._is_chat else _TASKS if self._is_florence else {"short": ""}

    def ask(self, images: Sequence[Image.Image], prompt: str, max_tokens: int) -> list[Answer]:
        """Asks the same of each RGB image, without sampling; answers in their order."""
        with _ONE_AT_A_TIME, torch.inference_mode():
            inputs = self._inputs(images, prompt).to(self._device, self._dtype)
            generated = self._model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        given = self._num_given(inputs)
        spoken = generated[:, given:] if self._is_chat else generated
        texts = self._processor.batch_decode(spoken, skip_special_tokens=True)
        cut = [self._is_cut(row[given:].tolist(), max_tokens) for row in generated]
        return [_answer(text, is_cut) for text, is_cut in zip(texts, cut, strict=True)]

    def _inputs(self, images: Sequence[Image.Image], prompt: str) -> Any:
        options = {"return_tensors": "pt", "padding": True}
        if self._is_chat:
            chats = [
                [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
                for image in images
            ]
            how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            return self._processor.apply_chat_template(chats, **how, processor_kwargs=options)
        words = {"text": [prompt] * len(images)} if prompt else {}
        return self._processor(images=list(images), **words, **options)

    def _num_given(self, inputs: Any) -> int:
        """How many tokens of what comes out are none of the model's: the question, or what begins each answer."""
        if self._is_chat and not self._model.config.is_encoder_decoder:
            return int(inputs["input_ids"].shape[1])
        if self._model.config.is_encoder_decoder or "input_ids" not in inputs:
            return 1
        return int(inputs["input_ids"].shape[1]) - 1  # without the end mark, in place of which the caption goes on

    def _is_cut(self, tokens: Sequence[int], max_tokens: int) -> bool:
        """Whether the answer came to its limit; some models put an end mark there too."""
        text = self._model.config.get_text_config()
        ends = {self._model.generation_config.pad_token_id, getattr(text, "sep_token_id", None)}
        end = self._model.generation_config.eos_token_id
        ends |= set(end) if isinstance(end, list) else {end}
        length = next((number for number, token in enumerate(tokens) if token in ends), len(tokens))
        return length + 1 >= max_tokens


def _answer(text: str, is_cut: bool) -> Answer:
    text = text.strip()
    return Answer("too_long" if text and is_cut else kind_of(text), text)


@lru_cache(maxsize=1)
def load_captioner(config: CaptionModelConfig) -> Captioner:
    """Loads the model once per process, on its GPU if there is one; UserError if it is missing or of another kind."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = model_folder(config)
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype="auto"
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(
            f"caption.model: {config.name} cannot be loaded as a model that turns an image into text ({error}). It "
            "needs a processor and weights in safetensors, and no code of its own; Florence-2 is published in this "
            "form as florence-community/Florence-2-base."
        ) from error
    device = claim_device()
    return Captioner(model, processor, device, torch_dtype(resolve(config.precision, device)))


def model_folder(config: CaptionModelConfig) -> Path:
    """The model's folder, fetched from the hub if need be; UserError if there is none."""
    folder = Path(config.name)
    if not folder.is_dir():
        folder = snapshot(config.name, "captioner", list(_FILES), config.revision)
    if not (folder / "config.json").exists():
        raise UserError(f"caption.model.name: the folder {folder} holds no model of transformers (no config.json).")
    return folder


@lru_cache(maxsize=4)
def model_digest(config: CaptionModelConfig) -> str:
    """Hex digest of the files that determine the answers: the same in the hub's cache and in a folder of one's own."""
    folder = model_folder(config)
    files = sorted({path for pattern in _FILES for path in folder.glob(pattern)})
    named = "".join(f"{_sha256(path)}  {path.name}\n" for path in files if path.name != "README.md")
    return hashlib.sha256(named.encode()).hexdigest()


def _sha256(path: Path) -> str:
    """The hub's cache names large files by it."""
    blob = path.resolve().name
    return blob if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", blob) else sha256_of(path)
