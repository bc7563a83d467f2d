"""Ends a command of ours: with its figures, or with a sentence about what went wrong."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping

from sdtrain.errors import user_error_of


def exit_code_of(run: Callable[[], object]) -> int:
    """Runs a command; returns its exit code, 2 for a user's error, of which it prints the sentence."""
    try:
        run()
    except Exception as error:
        problem = user_error_of(error)
        if problem is None:
            raise
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


def print_figures(run: Callable[[], Mapping[str, object]], look_at: str) -> int:
    """Runs a demo and prints its figures as JSON on the last line; returns the exit code, as `exit_code_of` does.

    `look_at` names the figure that is a file to look at.
    """

    def run_and_print() -> None:
        figures = run()
        # Prefect logs at exit, but the figures must be the last line.
        logging.getLogger("prefect").setLevel(logging.WARNING)
        print(f"Look at {figures[look_at]}")
        print(json.dumps(figures))

    return exit_code_of(run_and_print)
