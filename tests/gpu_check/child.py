"""Runs one stage in this process: python -m tests.gpu_check.child TARGET FIGURES WORK RESULT SECONDS [--small]."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.gpu_check.record import read_result, write_whole


class CheckFailedError(Exception):
    """A figure that is not as it must be."""


class Check:
    """A stage's view of its run.

    Attributes:
        work: a folder that all stages share.
        is_small: there is no GPU, and everything is to be small.
    """

    def __init__(self, figures: Path, work: Path, out: Path, seconds: float, is_small: bool):
        self.work, self.is_small = work, is_small
        self._file, self._out, self._deadline = figures, out, time.monotonic() + seconds
        self._figures: dict[str, Any] = {}
        self._broken: list[str] = []
        self._write()

    def seconds_left(self) -> float:
        """Time until this process is ended."""
        return self._deadline - time.monotonic()

    def record(self, **figures: Any) -> None:
        """Keeps figures, on disk at once."""
        self._figures |= figures
        self._write()
        print(f"recorded {json.dumps(figures)}", flush=True)

    def expect(self, holds: bool, what: str) -> None:
        """Notes what does not hold; the stage goes on, and fails at its end."""
        if not holds:
            self._broken.append(what)
            print(f"broken: {what}", flush=True)

    def earlier(self, stage: str) -> dict[str, Any]:
        """Figures of a stage that ran before; empty if it did not."""
        stages = read_result(self._out).get("stages", [])
        return next((dict(entry["figures"]) for entry in stages if entry["name"] == stage), {})

    def run(self, stage: Callable[[Check], None]) -> bool:
        """Runs the stage and records how it ended; says whether all was well."""
        missing, problem = None, None
        try:
            stage(self)
            if self._broken:
                raise CheckFailedError("; ".join(self._broken))
        except ModuleNotFoundError as error:
            missing, problem = error.name, traceback.format_exc()
        except Exception:
            problem = traceback.format_exc()
        self._write(has_ended=True, missing=missing, problem=problem)
        print(problem or "all well", flush=True)
        return problem is None

    def _write(self, **end: Any) -> None:
        write_whole(self._file, json.dumps({"figures": self._figures, **end}))


def end_with(parent: int, work: Path) -> None:
    """Ends this process and its children, and deletes `work`, once `parent` has gone, however it went."""
    import psutil

    while os.getppid() == parent:
        time.sleep(0.2)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    shutil.rmtree(work, ignore_errors=True)
    os._exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("figures", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("parent", type=int)
    parser.add_argument("--small", action="store_true")
    chosen = parser.parse_args()
    threading.Thread(target=end_with, args=(chosen.parent, chosen.work), daemon=True).start()
    check = Check(chosen.figures, chosen.work, chosen.out, chosen.seconds, chosen.small)
    module, _, function = chosen.target.partition(":")
    return 0 if check.run(lambda check: getattr(importlib.import_module(module), function)(check)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
