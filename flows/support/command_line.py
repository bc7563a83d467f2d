"""Ends a demo's command: with its figures, or with a sentence about what went wrong."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping

from sdtrain.errors import user_error_of


def print_figures(run: Callable[[], Mapping[str, object]], look_at: str) -> int:
    """Runs a demo and prints its figures as JSON on the last line; returns the exit code, 2 for a user's error.

    `look_at` names the figure that is a file to look at.
    """
    try:
        figures = run()
    except Exception as error:
        problem = user_error_of(error)
        if problem is None:
            raise
        print(f"error: {problem}", file=sys.stderr)
        return 2
    # Prefect logs at exit, but the figures must be the last line.
    logging.getLogger("prefect").setLevel(logging.WARNING)
    print(f"Look at {figures[look_at]}")
    print(json.dumps(figures))
    return 0
