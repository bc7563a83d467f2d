"""Walks a source's folders in the order of their names, past hidden files and links that lead elsewhere."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_NUM_EXAMPLES = 3
_JUNK = "__MACOSX"


@dataclass
class Skipped:
    """Counts what is passed over, by reason, with the names of the first few."""

    counts: Counter[str] = field(default_factory=Counter)
    _examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str, number: int = 1) -> None:
        """Counts one more, or `number` at once."""
        self.counts[reason] += number
        examples = self._examples.setdefault(reason, [])
        if len(examples) < _NUM_EXAMPLES:
            examples.append(printable(name))

    def remarks(self) -> list[str]:
        """A sentence for each reason, sorted."""
        return [f"{reason}: {self.counts[reason]:,} ({self._shown(reason)})" for reason in sorted(self.counts)]

    def _shown(self, reason: str) -> str:
        examples = self._examples[reason]
        return ", ".join(examples) + (", …" if self.counts[reason] > len(examples) else "")


def printable(name: str) -> str:
    """A file's name as text that can be printed and stored."""
    return name.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Folder:
    """One folder: its path relative to the source ("" for the source itself), and its regular files' sizes by name."""

    path: str
    files: dict[str, int]

    def join(self, name: str) -> str:
        """The path, relative to the source, of a file in it."""
        return f"{self.path}/{name}" if self.path else name


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that systems write beside a user's own: `._a.jpg`, `.DS_Store`, `__MACOSX`."""
    return (name.startswith(".") and name not in (".", "..")) or name == _JUNK


def stays_inside(path: str, root: str) -> bool:
    """Whether a path leads to somewhere in `root`, itself free of links, once its links are followed."""
    real = os.path.realpath(path)
    return real == root or real.startswith(root.rstrip("/") + "/")


class Walk:
    """Iterates over the folders of `root`, each before its subfolders; counts in `skipped` what is not read."""

    def __init__(self, root: Path, follow_links: bool, skipped: Skipped) -> None:
        self._root, self._follow, self._skipped = os.path.realpath(root), follow_links, skipped
        self._seen = {self._root}

    def __iter__(self) -> Iterator[Folder]:
        waiting = [""]
        while waiting:
            path = waiting.pop()
            folder, subfolders = self._read(path)
            yield folder
            waiting += [folder.join(name) for name in reversed(subfolders)]

    def _read(self, path: str) -> tuple[Folder, list[str]]:
        folder, subfolders = Folder(path, {}), list[str]()
        try:
            with os.scandir(f"{self._root}/{path}") as found:
                entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            self._skipped.add("folders that cannot be read", f"{path or '.'}: {error.strerror}")
            return folder, []
        for entry in entries:
            try:
                self._sort_in(entry, folder, subfolders)
            except FileNotFoundError:  # just now
                continue
            except OSError:
                self._skipped.add("files that cannot be read", folder.join(entry.name))
        return folder, subfolders

    def _sort_in(self, entry: os.DirEntry[str], folder: Folder, subfolders: list[str]) -> None:
        name = folder.join(entry.name)
        if is_hidden(entry.name):
            self._skipped.add("hidden files and folders skipped", name)
        elif entry.is_symlink() and not Path(entry.path).exists():
            self._skipped.add("broken links skipped", name)
        elif entry.is_symlink() and not self._follow and not stays_inside(entry.path, self._root):
            self._skipped.add("links that lead out of the source skipped (--follow-links reads them)", name)
        elif entry.is_dir():
            self._enter(entry, name, subfolders)
        elif not entry.is_file():
            self._skipped.add("neither files nor folders, skipped", name)
        elif not os.access(entry.path, os.R_OK):
            self._skipped.add("files that cannot be read", name)
        else:
            folder.files[entry.name] = entry.stat().st_size

    def _enter(self, entry: os.DirEntry[str], name: str, subfolders: list[str]) -> None:
        if entry.is_symlink():
            real = os.path.realpath(entry.path)
            if real in self._seen or stays_inside(real, self._root):
                self._skipped.add("links to folders that are read anyway skipped", name)
                return
            self._seen.add(real)
        subfolders.append(entry.name)
