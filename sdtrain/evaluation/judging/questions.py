"""The prompts of GenEval 2 and the questions about their images.

Its file, geneval2_data.jsonl, has a JSON object a line (facebookresearch/GenEval2): `prompt`; `vqa_list`, pairs of a
question and its right answer, one for each atom of the prompt; `skills`, what each question tests (object, attribute,
count, position, verb); and `atom_count`, the atoms by which the paper groups prompts, without the words "a" and "and".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from sdtrain.errors import UserError
from sdtrain.evaluation.prompts import digest_of

ATOM = "{question} Answer in one word."
"""How GenEval 2 asks an atom's question."""
WHOLE = 'Does this image show "{prompt}"? Answer the question with Yes or No.'
"""How it asks for VQAScore (Lin et al. 2024, arXiv:2404.01291)."""
_NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@dataclass(frozen=True)
class Question:
    """One question as it is asked, and the words that are right answers to it."""

    text: str
    answers: tuple[str, ...]


class JudgedPrompt(BaseModel):
    """A line of the file."""

    prompt: str = Field(min_length=1)
    vqa_list: list[tuple[str, str]] = Field(min_length=1)
    skills: list[str]
    atom_count: int | None = None

    @model_validator(mode="after")
    def _a_skill_for_each(self) -> JudgedPrompt:
        if len(self.skills) != len(self.vqa_list):
            raise ValueError(f"{len(self.vqa_list)} questions have {len(self.skills)} skills")
        return self

    @property
    def questions(self) -> list[Question]:
        """The atoms' questions, then the one about the whole prompt."""
        atoms = [Question(ATOM.replace("{question}", question), _words(answer)) for question, answer in self.vqa_list]
        return [*atoms, Question(WHOLE.replace("{prompt}", self.prompt), ("yes",))]


def _words(answer: str) -> tuple[str, ...]:
    word = answer.strip().casefold()
    return (word, str(_NUMBERS.index(word) + 1)) if word in _NUMBERS else (word,)


def read_questions(path: Path) -> tuple[JudgedPrompt, ...]:
    """All prompts, in order, of a .jsonl file or of a JSON list; UserError names the line that has another form."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as questions: {error}.") from error
    prompts = tuple(_parsed(record, f"{path}, {place}") for place, record in _records(text, path))
    if len(prompts) < 2:
        raise UserError(f"{path} holds {len(prompts)} prompts; a number with its spread needs two at least.")
    return prompts


def questions_digest(prompts: Sequence[JudgedPrompt]) -> str:
    """Hex sha256 of prompts, questions, answers, skills and the words around them."""
    return digest_of([ATOM, WHOLE, *(prompt.model_dump_json() for prompt in prompts)])


@lru_cache(maxsize=2)
def read_judged(path: Path, digest: str) -> tuple[JudgedPrompt, ...]:
    """The questions as an evaluation keeps them; UserError if they do not match the digest."""
    prompts = tuple(JudgedPrompt.model_validate(record) for record in json.loads(path.read_text()))
    if questions_digest(prompts) != digest:
        raise UserError(
            f"{path} was changed by another evaluation while this one runs. Run them one after the other, or give each "
            "its own --output."
        )
    return prompts


def _records(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        yield from ((f"entry {number}", record) for number, record in enumerate(_json(text, str(path)), 1))
        return
    for number, line in enumerate(text.split("\n"), 1):  # JSON's strings may hold other characters that end lines
        if line.strip():
            yield f"line {number}", _json(line, f"{path}, line {number}")


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}.") from error


def _parsed(record: Any, place: str) -> JudgedPrompt:
    try:
        return JudgedPrompt.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{place}{f', {where}' if where else ''}: {first['msg']}. A prompt has `prompt`, `vqa_list` (pairs of a "
            "question and its answer) and `skills` (one for each), as geneval2_data.jsonl of GenEval 2 has them."
        ) from error
