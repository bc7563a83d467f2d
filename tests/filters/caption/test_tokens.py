"""CLIP's tokens are counted without its weights, and a text of 77 is one that training reads whole."""

from open_clip.tokenizer import SimpleTokenizer

from sdtrain.models.clip_tokens import MAX_TOKENS, count_tokens

TEXTS = [
    "",
    "a photo of a cat",
    "Women's T-Shirt (100% cotton) — déjà vu, 12345!",
    "東京タワー 🗼",
    "word " * 75,
    "word " * 76,
    "supercalifragilisticexpialidocious-unhyphenated",
]


def test_they_are_those_of_clips_own_tokenizer():
    reference = SimpleTokenizer()
    assert count_tokens(TEXTS) == [2 + len(reference.encode(text)) for text in TEXTS]


def test_the_start_and_the_end_token_count():
    assert count_tokens(["", "word " * 75, "word " * 76]) == [2, MAX_TOKENS, MAX_TOKENS + 1]
