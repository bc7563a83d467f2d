"""Detects hanging training, names the ranks that are behind, and ends the job.

A rank that is stopped, swapped out or waits for a dead disk blocks the others in a collective operation for half an
hour. So a thread of every rank writes a heartbeat, and reads the others' when its own main thread stalls.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil
from pydantic import ValidationError

from sdtrain.settings import Settings
from sdtrain.training.distributed import Ranks

ItemT = TypeVar("ItemT")
EXIT_CODE = 3
_FORWARD = "a pass through the network"
_PHASES_THAT_COMPILE = (_FORWARD, "validation", "previews")
_PULSE_S = 5.0


class Heartbeat(Settings):
    """Status that a rank publishes."""

    rank: int
    host: str
    pid: int
    started: float
    """Creation time of the process, which distinguishes it from a later one with the same id."""
    pulse: int
    """Grows while the process lives, whatever its main thread does."""
    num_moves: int
    """Grows with every phase of every step; all ranks pass the same ones, in the same order."""
    place: str
    """The main thread's position, for messages."""
    may_compile: bool = False
    """The network may be compiled there, which takes longer than any step."""


class Watchdog:
    """Watches this rank and, when it hangs for `timeout_s` (0: never), the others, around the training loop.

    While any rank may be compiling the network, all wait for `compile_timeout_s` (0: the network is not compiled). That
    is in a rank's first pass with each shape of batch, its first validation and its first previews. `end` is os._exit
    by default, because the main thread does not respond.
    """

    def __init__(
        self,
        run_dir: Path,
        ranks: Ranks,
        timeout_s: float,
        end: Callable[[int], None] = os._exit,
        compile_timeout_s: float = 0.0,
    ):
        self._beats, self._stalled = run_dir / "heartbeats", run_dir / "stalled"
        self._ranks, self._timeout_s, self._end = ranks, timeout_s, end
        self._compile_timeout_s = compile_timeout_s
        self._pulse_s = min(_PULSE_S, timeout_s / 4)
        self._place, self._num_moves, self._pulse = "before the first step", 0, 0
        self._may_compile, self._compiled = False, set[tuple[str, Hashable]]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, step: int, phase: str, shape: Hashable = None) -> None:
        """The main thread begins `phase` of the optimizer step after `step`, with batches of one `shape`."""
        self._place = f"{phase} after step {step}"
        self._may_compile = phase in _PHASES_THAT_COMPILE and (phase, shape) not in self._compiled
        self._compiled.add((phase, shape))
        self._num_moves += 1

    def follow(
        self, batches: Iterator[ItemT], step: int, shape_of: Callable[[ItemT], Hashable] = lambda _: None
    ) -> Iterator[ItemT]:
        """Passes on a step's micro-batches, marking the wait for each and the work on it."""
        self.at(step, "waiting for data")
        for batch in batches:
            self.at(step, _FORWARD, shape_of(batch))
            yield batch
            self.at(step, "waiting for data")

    def __enter__(self) -> Watchdog:
        if self._timeout_s:
            if self._ranks.is_first:
                shutil.rmtree(self._stalled, ignore_errors=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._timeout_s:
            self._thread.join()
            self._file(self._ranks.rank).unlink(missing_ok=True)
            with suppress(OSError):  # the last rank finds it empty
                self._beats.rmdir()

    def _watch(self) -> None:
        self._beat()
        seen, moved_at, last_look = -1, time.monotonic(), time.monotonic()
        while not self._over.wait(self._pulse_s):
            self._beat()
            now = time.monotonic()
            was_suspended = now - last_look > 3 * self._pulse_s  # the whole process, perhaps with all others
            last_look = now
            if seen != self._num_moves or was_suspended:
                seen, moved_at = self._num_moves, now
            elif now - moved_at > self._timeout_s and now - moved_at > self._limit_s(self._all_beats()):
                self._give_up()
                return

    def _limit_s(self, beats: dict[int, Heartbeat]) -> float:
        waits = any(beat.may_compile for beat in beats.values())
        return max(self._timeout_s, self._compile_timeout_s) if waits else self._timeout_s

    def _give_up(self) -> None:
        """Names the ranks behind, once for all ranks; ends this process and unresponsive ones on this machine."""
        before = self._all_beats()
        for _ in range(3):
            time.sleep(self._pulse_s)
            self._beat()
        after = self._all_beats()
        answering = [rank for rank in after if rank not in before or after[rank].pulse > before[rank].pulse]
        verdict = self._stalled / "verdict.txt"
        self._stalled.mkdir(exist_ok=True)
        with (self._stalled / f"stack-of-rank-{self._ranks.rank:05d}.txt").open("w") as file:
            faulthandler.dump_traceback(file)
        if self._ranks.rank != min(answering):
            time.sleep(2 * self._pulse_s)
        if not verdict.exists():
            text = self._sentence(after, answering)
            print(f"error: {text}", file=sys.stderr, flush=True)
            verdict.write_text(text + "\n")
        for rank in after.keys() - set(answering):
            _kill_if_here(after[rank])
        self._end(EXIT_CODE)

    def _sentence(self, beats: dict[int, Heartbeat], answering: list[int]) -> str:
        silent = [rank for rank in range(self._ranks.world_size) if rank not in answering]
        fewest = min(beats[rank].num_moves for rank in answering)
        behind = [rank for rank in answering if beats[rank].num_moves == fewest]
        if silent:
            named = "; ".join(_describe(rank, beats.get(rank)) for rank in silent)
            what = f"{named}. No sign of life: the process is stopped or killed, or its machine is gone"
        elif len(behind) < len(answering):
            named = "; ".join(_describe(rank, beats[rank]) for rank in behind)
            what = f"{named}. The others are further on and wait for it"
        else:
            what = f"all ranks are at the same place ({beats[behind[0]].place}) and do not come back from it"
            hosts = sorted({beat.host for beat in beats.values()})
            what += f"; perhaps the network between {', '.join(hosts)} is cut" if len(hosts) > 1 else ""
        limit_s = self._limit_s(beats)
        setting = "guard.stall_timeout_s"
        if limit_s > self._timeout_s:
            setting = "guard.compile_timeout_s, which holds while the network may be compiled: raise it if it was"
        return (
            f"Training made no progress for {limit_s:g} s ({setting}). Behind: {what}. "
            f"The job ends here; {self._stalled} holds where each rank is. Start it again to go on from the last "
            "checkpoint."
        )

    def _beat(self) -> None:
        """Publishes this rank's heartbeat. A full disk must not end the watch; it shows elsewhere."""
        self._pulse += 1
        beat = Heartbeat(
            rank=self._ranks.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            pulse=self._pulse,
            num_moves=self._num_moves,
            place=self._place,
            may_compile=self._may_compile,
        )
        with suppress(OSError):
            self._beats.mkdir(parents=True, exist_ok=True)
            temporary = self._file(self._ranks.rank).with_suffix(".partial")
            temporary.write_text(beat.model_dump_json())
            temporary.replace(self._file(self._ranks.rank))

    def _all_beats(self) -> dict[int, Heartbeat]:
        beats = {}
        for rank in range(self._ranks.world_size):
            with suppress(OSError, ValidationError):
                beats[rank] = Heartbeat.model_validate_json(self._file(rank).read_bytes())
        return beats

    def _file(self, rank: int) -> Path:
        return self._beats / f"rank-{rank:05d}.json"


def _describe(rank: int, beat: Heartbeat | None) -> str:
    if beat is None:
        return f"rank {rank}, which never said where it is"
    return f"rank {rank} on {beat.host} (process {beat.pid}), in {beat.place}"


def _kill_if_here(beat: Heartbeat) -> None:
    """Kills an unresponsive process: a stopped one does not react to the launcher's SIGTERM."""
    if beat.host == socket.gethostname():
        with suppress(psutil.Error):
            process = psutil.Process(beat.pid)
            if process.create_time() == beat.started:
                process.kill()
