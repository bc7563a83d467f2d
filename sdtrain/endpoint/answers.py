"""Answers, told apart by whether they can be used."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from sdtrain.endpoint.failures import BrokenAnswerError

Kind = Literal["text", "empty", "refused", "too_long", "rejected", "failed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MEANINGS: dict[Kind, str] = {
    "text": "a whole answer",
    "empty": "no words",
    "refused": "the model declines, or a content filter stopped it",
    "too_long": "cut off at max_tokens, or longer",
    "rejected": "the server does not accept the request (400, 413, 422)",
    "failed": "no whole answer after all retries, while other requests had theirs",
}
# The usual openings of a refusal, by which models decline without the protocol's field for it.
_REFUSAL = re.compile(
    r"(?:i['\u2019]?m|i am) (?:very |really |so )?(?:sorry|unable to|not able to)\b|sorry, (?:but )?i\b|"
    r"i (?:can['\u2019]?t|cannot|can not|won['\u2019]?t) "
    r"(?:help|assist|describe|identify|comply|provide|answer|fulfil)|"
    r"(?:as|being) an ai\b",
    re.I,
)
# A model's thoughts before its answer, where the server does not tell them apart; the opening mark may be the prompt's.
_THOUGHTS = re.compile(r".*(?:</think>|\[/THINK\]|◁/think▷)", re.S)
_BEGINS_TO_THINK = re.compile(r"\s*(?:<think>|\[THINK\]|◁think▷)")


@dataclass(frozen=True)
class Usage:
    """Tokens, as the server counts them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens)

    @property
    def total_tokens(self) -> int:
        """Tokens of questions and answers."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Answer:
    """The answer to one request.

    Attributes:
        kind: one of `KINDS`; only of a "text" is `text` meant to be used.
        text: stripped of white space around it.
        model: the model's id, as the server reports it with the answer.
        usage: its tokens; None if the server does not count them.
        first_token: probabilities of the candidates for the first token; empty without logprobs, and where the model
            thinks before it answers, as that token is then none of the answer's.
        detail: why the request was "rejected" or has "failed".
    """

    kind: Kind
    text: str = ""
    model: str = ""
    usage: Usage | None = None
    first_token: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""

    def probability_of(self, word: str) -> float:
        """The probability that the answer begins with the token `word`, in any case and after a space or not.

        Without logprobs 1 if it begins with this word, else 0.
        """
        if not self.first_token:
            return float(re.match(rf"\W*{re.escape(word)}\b", self.text, re.I) is not None)
        return min(1.0, sum(chance for token, chance in self.first_token.items() if _same(token, word)))

    def probability_of_yes(self) -> float | None:
        """P(yes) / (P(yes) + P(no)); without logprobs 1 or 0; None if the answer is neither."""
        yes, no = self.probability_of("yes"), self.probability_of("no")
        return yes / (yes + no) if yes + no > 0 else None

    def as_record(self) -> dict[str, Any]:
        """As JSON values; `answer_of_record` reads them."""
        return asdict(self)


def answer_of_record(record: Mapping[str, Any]) -> Answer:
    """The answer that `Answer.as_record` wrote."""
    return Answer(**{**record, "usage": Usage(**record["usage"]) if record["usage"] else None})


def parse_answer(content: Any, max_tokens: int) -> Answer:
    """Reads the JSON of a chat completion; BrokenAnswerError if it is none."""
    try:
        choice = content["choices"][0]
        message = choice["message"]
        said = _text_of(message.get("content")).strip()
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        refusal = message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BrokenAnswerError("the answer is not a chat completion") from None
    text = _without_thoughts(said)
    usage = _usage_of(content.get("usage"))
    kind = _kind(text, bool(refusal), choice.get("finish_reason"), usage, max_tokens)
    first_token = {} if thoughts or text != said else _first_token(choice.get("logprobs"))
    return Answer(kind, text, str(content.get("model") or ""), usage, first_token)


def kind_of(text: str) -> Kind:
    """Tells a refusal, or an answer without words, by the stripped text alone."""
    return "refused" if _REFUSAL.match(text) else "text" if text else "empty"


def _kind(text: str, is_refusal: bool, finish: Any, usage: Usage | None, max_tokens: int) -> Kind:
    if is_refusal or finish == "content_filter":
        return "refused"
    if (kind := kind_of(text)) != "text":
        return "too_long" if not text and finish == "length" else kind  # it was still thinking
    # Some servers ignore max_tokens, and some count no tokens; a word is a token at least.
    num_tokens = max(usage.completion_tokens if usage else 0, len(text.split()))
    return "too_long" if finish == "length" or num_tokens > max_tokens else "text"


def _without_thoughts(text: str) -> str:
    text = _THOUGHTS.sub("", text, count=1).strip()
    return "" if _BEGINS_TO_THINK.match(text) else text


def _text_of(content: Any) -> str:
    if isinstance(content, list):  # in parts, as some servers write it
        content = "".join(part.get("text") or "" for part in content)
    if content is not None and not isinstance(content, str):
        raise TypeError("neither text nor parts")
    # Half of a surrogate pair, as of an emoji that was cut off, is no text that a table can hold.
    return (content or "").encode(errors="replace").decode()


def _usage_of(counts: Any) -> Usage | None:
    if not isinstance(counts, dict):
        return None
    prompt, completion = counts.get("prompt_tokens"), counts.get("completion_tokens")
    if not isinstance(prompt, int):
        return None
    return Usage(prompt, completion if isinstance(completion, int) else 0)


def _first_token(logprobs: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    try:
        first = logprobs["content"][0]
        # The token itself may be missing among the alternatives.
        for one in first.get("top_logprobs") or [first]:
            found[one["token"]] = found.get(one["token"], 0.0) + math.exp(one["logprob"])
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError):
        return {}
    return found


def _same(token: str, word: str) -> bool:
    # SentencePiece's and BPE's marks of a space, which some servers leave in.
    return token.strip(" \n\t▁Ġ").casefold() == word.casefold()
