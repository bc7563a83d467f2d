"""Word lists that group captions, and the SQL that looks for them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, model_validator

from sdtrain.settings import Settings, load_settings

OWN = Path(__file__).parent / "word_lists.yaml"
UNDETERMINED = "not determined"
NO_LETTERS = "no letters"

_OTHER = re.compile(r"[\W_]+")
_LETTERS = r"length(regexp_replace(caption, '\PL', '', 'g'))"
# Everything but the letters of a language that is told by its script; Japanese, which needs kana, before Chinese.
_SCRIPTS = {
    "Japanese": r"[^\p{Hiragana}\p{Katakana}\p{Han}]",
    "Chinese": r"\P{Han}",
    "Korean": r"\P{Hangul}",
    "Arabic script": r"\P{Arabic}",
    "Hebrew": r"\P{Hebrew}",
    "Greek": r"\P{Greek}",
    "Thai": r"\P{Thai}",
    "Devanagari script": r"\P{Devanagari}",
}
_BY_WORDS, _CYRILLIC = r"[^\p{Latin}\p{Cyrillic}]", r"\P{Cyrillic}"
_KANA = "regexp_matches(caption, '[\\p{Hiragana}\\p{Katakana}]')"


class WordLists(Settings):
    """Words by which captions are counted; see word_lists.yaml."""

    description: str = ""
    groups: dict[str, dict[str, tuple[str, ...]]]
    """Theme -> group -> words and phrases."""
    crossed: tuple[str, str] | None = None
    """Two themes whose groups are counted together."""
    languages: dict[str, tuple[str, ...]] = Field(default={})
    """Language -> its common little words."""

    @model_validator(mode="after")
    def _are_words(self) -> WordLists:
        lists = [(f"{theme}: {group}", words) for theme, group, words in self.each()]
        for name, words in (*lists, *self.languages.items()):
            if not words or not all(_plain(word) for word in words):
                raise ValueError(f"'{name}' needs words, each with a letter or digit")
        for theme in self.crossed or ():
            if theme not in self.groups:
                raise ValueError(f"crossed names '{theme}', which is none of the groups' themes")
        return self

    def each(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Theme, group and words of all groups, in order."""
        for theme, groups in self.groups.items():
            for group, words in groups.items():
                yield theme, group, words

    def digest(self) -> str:
        """Hex sha256 of the lists."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json")).encode()).hexdigest()


def load_word_lists(path: Path | None = None) -> WordLists:
    """Reads lists, by default our own; UserError if the file is none such."""
    return load_settings(WordLists, path or OWN)


def words_sql() -> str:
    """SQL of a caption as its lower-case words, each between spaces of its own."""
    return r"'  ' || regexp_replace(lower(caption), '[^\p{L}\p{M}\p{N}]+', '  ', 'g') || '  '"


def pattern(words: tuple[str, ...]) -> str:
    """The regular expression that finds any of the words or phrases in what `words_sql` gives."""
    return f" (?:{'|'.join(sorted({re.escape(_plain(word)) for word in words}))}) ".replace("\\ ", "  ")


def _plain(word: str) -> str:
    return _OTHER.sub(" ", word.lower()).strip()


def language_sql(lists: WordLists) -> tuple[str, dict[str, str]]:
    """SQL of a caption's language, by its script or its little words, from `caption` and `words`, and what to bind."""
    bound = {f"language_{number}": pattern(words) for number, words in enumerate(lists.languages.values())}
    hits = {name: f"len(regexp_extract_all(words, ${key}))" for name, key in zip(lists.languages, bound, strict=True)}
    found = ", ".join(f"struct_pack(num := {sql}, name := {_literal(name)})" for name, sql in hits.items())
    rest = f"CASE WHEN {_most(_CYRILLIC)} THEN 'Cyrillic script' ELSE '{UNDETERMINED}' END"
    by_words = f"coalesce((SELECT {_BEST} FROM (SELECT [{found}] AS found)), {rest})" if hits else rest  # noqa: S608
    scripts = " ".join(
        f"WHEN {_most(letters)}{f' AND {_KANA}' * (name == 'Japanese')} THEN {_literal(name)}"
        for name, letters in _SCRIPTS.items()
    )
    case = f"CASE WHEN {_LETTERS} = 0 THEN '{NO_LETTERS}' WHEN {_most(_BY_WORDS)} THEN {by_words} {scripts}"
    return f"{case} ELSE '{UNDETERMINED}' END", bound


_BEST = (
    "CASE WHEN list_max(list_transform(found, x -> x.num)) = 0 "
    "OR len(list_filter(found, x -> x.num = list_max(list_transform(found, y -> y.num)))) > 1 "
    "THEN NULL ELSE list_filter(found, x -> x.num = list_max(list_transform(found, y -> y.num)))[1].name END"
)


def _most(others: str) -> str:
    """SQL of whether at least half of a caption's letters are none of `others`."""
    return f"2 * length(regexp_replace(caption, '{others}', '', 'g')) >= {_LETTERS}"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
