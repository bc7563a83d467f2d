"""Image-to-text models with the files of published ones, random and narrow: LLaVA, BLIP, Florence-2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = "a an the red green blue ball cube house dog cat sea on in of and with small large photo two".split()
CHAT = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
SIDE_PX, PATCH_PX = 32, 16


def _word_tokenizer(special: list[str]) -> Tokenizer:
    words = [*special, "user", "assistant", "describe", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def _few_words(model: Any, words: range, end: int) -> None:
    """Answers consist of words and end soon: a random model would write on."""
    model.generation_config.eos_token_id = [end, *list(words)[::3]]


def write_llava(folder: Path, seed: int = 0) -> Path:
    """A LLaVA, as `LlavaForConditionalGeneration` and its processor save it."""
    torch.manual_seed(seed)
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_word_tokenizer(special),
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        extra_special_tokens={"image_token": "<image>"},
    )
    image = CLIPImageProcessor(size={"shortest_edge": SIDE_PX}, crop_size={"height": SIDE_PX, "width": SIDE_PX})
    LlavaProcessor(
        image, tokenizer, patch_size=PATCH_PX, vision_feature_select_strategy="default", chat_template=CHAT,
        image_token="<image>", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    narrow = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=SIDE_PX, patch_size=PATCH_PX, projection_dim=16, **narrow),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=512, **narrow
        ),
        image_token_index=4,
        pad_token_id=3,
        eos_token_id=2,
        bos_token_id=1,
    )
    model = LlavaForConditionalGeneration(config)
    _few_words(model, range(8, len(tokenizer)), end=2)
    model.save_pretrained(folder)
    return folder


def cached(cache: Path, name: str, write: Any) -> Path:
    """Writes a model into Hugging Face's cache, as a download would have, and returns its folder."""
    repository = cache / f"models--{name.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    return write(repository / "snapshots" / revision)
