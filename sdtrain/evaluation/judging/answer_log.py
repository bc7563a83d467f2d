"""Keeps a judge's answers as they come, so that none is asked, or paid, twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sdtrain.endpoint.answers import Answer, answer_of_record
from sdtrain.endpoint.messages import Request


def request_digest(model: Mapping[str, Any], request: Request) -> str:
    """Of everything that decides an answer: the judge's settings, the words, and the image's bytes."""
    digest = hashlib.sha256(json.dumps([model, request.prompt, request.max_tokens, request.top_logprobs]).encode())
    for image in request.images:
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()[:32]


class AnswerLog:
    """The answers of one part, a line each, by the digest of their request: `with AnswerLog(path) as log`.

    A line that a killed process left unfinished is dropped. The file stays when the part is finished: a request that is
    the same later, with more questions or after a change of settings, is not asked again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._answers: dict[str, Answer] = {}

    def __enter__(self) -> AnswerLog:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        whole, _, unfinished = self._path.read_bytes().rpartition(b"\n")
        for record in map(json.loads, whole.splitlines()):
            self._answers[record["request"]] = answer_of_record(record["answer"])
        self._file: IO[bytes] = self._path.open("r+b")
        self._file.seek(-len(unfinished), 2)
        self._file.truncate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, request: str) -> bool:
        return request in self._answers

    def __getitem__(self, request: str) -> Answer:
        return self._answers[request]

    def add(self, request: str, answer: Answer) -> None:
        """Keeps an answer; one that failed counts in this run only, and is asked again by the next."""
        self._answers[request] = answer
        if answer.kind != "failed":
            self._file.write(json.dumps({"request": request, "answer": answer.as_record()}).encode() + b"\n")
            self._file.flush()  # to the system, which outlives this process
