from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

import sdtrain.demo
from sdtrain.demo.images import BACKGROUNDS, COLORS, SHAPES, caption, random_scene
from sdtrain.demo.text_encoder import MAX_TOKENS, build_text_encoder, build_tokenizer

WEIGHTS = Path(sdtrain.demo.__file__).parent / "weights"


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")


@pytest.fixture(scope="module")
def encoder() -> CLIPTextModel:
    return CLIPTextModel.from_pretrained(WEIGHTS / "text_encoder")


def _states(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, text: str) -> torch.Tensor:
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids
    with torch.no_grad():
        states: torch.Tensor = encoder(ids).last_hidden_state[0]
    return states


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


def test_each_word_of_the_demo_is_one_token(tokenizer: CLIPTokenizer) -> None:
    words = [*COLORS, *SHAPES, *BACKGROUNDS, "a", "on", "of", "picture", "background"]
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)


def test_every_caption_fits(tokenizer: CLIPTokenizer) -> None:
    rng = np.random.default_rng(0)
    for color in COLORS:
        for shape in SHAPES:
            assert len(tokenizer(caption(random_scene(rng, color, shape), rng)).input_ids) <= MAX_TOKENS


def test_the_empty_caption_is_start_and_ends(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("", padding="max_length", max_length=tokenizer.model_max_length).input_ids
    assert ids == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * (MAX_TOKENS - 1)


def test_unknown_words_are_spelt_out_without_loss(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("zebra wörld 42", add_special_tokens=False).input_ids
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "zebra wörld 4 2"


def test_the_tokenizer_survives_saving(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    text = "a yellow ring on a noisy background"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.model_max_length == MAX_TOKENS


def test_vocab_and_merges_alone_make_the_same_tokenizer(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((WEIGHTS / "tokenizer" / name).read_bytes())
    text = "a picture of a cyan triangle"
    assert CLIPTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer(text).input_ids


def test_words_stay_apart_and_mean_the_same_anywhere(tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    colors = [_states(tokenizer, encoder, f"a {color} circle")[2] for color in COLORS]
    shapes = [_states(tokenizer, encoder, f"a red {shape}")[3] for shape in SHAPES]
    assert max(_cosine(a, b) for words in (colors, shapes) for a, b in combinations(words, 2)) < 0.4
    first, second = (
        _states(tokenizer, encoder, "a red circle"),
        _states(tokenizer, encoder, "red circle, plain background"),
    )
    assert _cosine(first[2], second[1]) > 0.8


def test_the_shipped_weights_are_what_the_command_makes(tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    for name, value in build_text_encoder(built).state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[name], value)


def test_the_shipped_files_are_small() -> None:
    assert (
        sum(path.stat().st_size for part in ("tokenizer", "text_encoder") for path in (WEIGHTS / part).iterdir()) < 1e6
    )
