"""Keeps a shard's answers as they come, so that none is asked, or paid, twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import IO

from sdtrain.dataset.files import publish
from sdtrain.endpoint.answers import Answer, answer_of_record


class AnswerLog:
    """The answers of one unfinished shard, one line each, by image and question: `with AnswerLog(path, key) as log`.

    `key` says of what the answers were made; those of another key are forgotten. A line that a killed process left
    unfinished is dropped.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._answers: dict[tuple[str, str], Answer] = {}

    def __enter__(self) -> AnswerLog:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = self._read()
        self._file: IO[bytes] = self._path.open("r+b" if kept else "wb")
        self._file.truncate(kept)
        self._file.seek(kept)
        if not kept:
            self._write({"key": self._key})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, question: tuple[str, str]) -> bool:
        return question in self._answers

    def __getitem__(self, question: tuple[str, str]) -> Answer:
        return self._answers[question]

    def add(self, uid: str, name: str, answer: Answer) -> None:
        """Keeps the answer to the question `name` about an image."""
        self._answers[uid, name] = answer
        self._write({"uid": uid, "name": name, "answer": answer.as_record()})

    def know(self, uid: str, name: str, answer: Answer) -> None:
        """Takes over an answer that is kept elsewhere; one that is in the log already stays."""
        self._answers.setdefault((uid, name), answer)

    def _write(self, record: dict[str, object]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()  # to the system, which outlives this process

    def _read(self) -> int:
        """Reads what is there; returns how many bytes of it count."""
        if not self._path.exists():
            return 0
        whole, _, _ = self._path.read_bytes().rpartition(b"\n")
        first, *lines = whole.split(b"\n")
        if not first or json.loads(first) != {"key": self._key}:
            return 0
        for record in map(json.loads, lines):
            if (answer := answer_of_record(record["answer"])).kind != "failed":  # another run asks again
                self._answers[record["uid"], record["name"]] = answer
        return len(whole) + 1


def forget_images(path: Path, is_removed: Callable[[str], bool]) -> None:
    """Rewrites a log without the answers about removed images, by their uid."""
    first, *lines = path.read_bytes().split(b"\n")[:-1] or [b""]
    kept = [line for line in lines if not is_removed(json.loads(line)["uid"])]
    if len(kept) < len(lines):
        with publish(path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in [first, *kept]))


def clear_finished(logs: Iterable[Path], is_recorded: Callable[[int], bool]) -> None:
    """Deletes the logs of recorded shards, whose writer was killed just before it did."""
    for path in logs:
        if is_recorded(int(path.name.partition(".")[0])):
            path.unlink(missing_ok=True)
