"""Image-to-text models with the files of published ones, random and narrow: LLaVA, BLIP, Florence-2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = [
    "a",
    "an",
    "the",
    "red",
    "green",
    "blue",
    "ball",
    "cube",
    "house",
    "dog",
    "cat",
    "sea",
    "on",
    "in",
    "of",
    "and",
]
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


def _spoken(model: Any, words: range, end: int, scale: int) -> None:
    """Makes answers that differ between images, and end after some words, as those of a trained model."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale if weight.ndim > 1 else 1)
    model.generation_config.min_new_tokens = 3
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
    _spoken(model, range(8, len(tokenizer)), end=2, scale=4)
    model.save_pretrained(folder)
    return folder


def write_blip(folder: Path, seed: int = 0) -> Path:
    """A BLIP, as `BlipForConditionalGeneration` and its processor save it."""
    torch.manual_seed(seed)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", *WORDS]
    numbered = {word: number for number, word in enumerate(words)}
    tokenizer = BertTokenizer(vocab=numbered, bos_token="[DEC]", additional_special_tokens=["[ENC]"])
    BlipProcessor(BlipImageProcessor(size={"height": SIDE_PX, "width": SIDE_PX}), tokenizer).save_pretrained(folder)
    narrow = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={"vocab_size": len(words), "encoder_hidden_size": 16, "projection_dim": 16, **narrow}
        | {"bos_token_id": 5, "eos_token_id": 3, "pad_token_id": 0, "sep_token_id": 3},
        vision_config={"image_size": SIDE_PX, "patch_size": PATCH_PX, "projection_dim": 16, **narrow},
        projection_dim=16,
        image_text_hidden_size=16,
    )
    model = BlipForConditionalGeneration(config)
    _spoken(model, range(0), end=3, scale=4)
    model.save_pretrained(folder)
    return folder


def write_florence2(folder: Path, seed: int = 0) -> Path:
    """A Florence-2, as `Florence2ForConditionalGeneration` and its processor save it (florence-community's files)."""
    torch.manual_seed(seed)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<image>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_word_tokenizer(special),
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        extra_special_tokens={"image_token": "<image>"},
    )
    image = CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    image.image_seq_length = 5
    Florence2Processor(image, tokenizer).save_pretrained(folder)
    text = BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=128,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    vision = {"embed_dim": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2], "num_groups": [1, 1, 2, 2]}
    config = Florence2Config(
        vision_config=vision | {"depths": [1, 1, 1, 1], "window_size": 2, "projection_dim": 16},
        text_config=text.to_dict(),
        image_token_id=4,
    )
    model = Florence2ForConditionalGeneration(config)
    _spoken(model, range(8, len(tokenizer)), end=2, scale=16)
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
