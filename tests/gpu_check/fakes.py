"""Stages for the runner's tests."""

from __future__ import annotations

import subprocess
import sys
import time

from tests.gpu_check.child import Check


def passes(check: Check) -> None:
    check.record(answer=42, earlier=check.earlier("before"))


def fails(check: Check) -> None:
    check.record(measured=1)
    raise ValueError("a planted mistake")


def breaks_a_limit(check: Check) -> None:
    check.expect(False, "0.3 is more than 0.1")
    check.record(measured_after=2)


def hangs(check: Check) -> None:
    """So does its child, which has left for a session of its own and names the stage's folder."""
    code = "import time; time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", code, str(check.work)], start_new_session=True)
    check.record(begun=str(check.work))
    time.sleep(600)


def dies(check: Check) -> None:
    import os

    os._exit(7)


def lacks_a_module(check: Check) -> None:
    import a_module_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401
