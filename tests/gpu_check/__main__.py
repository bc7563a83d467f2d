"""Checks and measures what needs a GPU: python -m tests.gpu_check [--budget SECONDS] [--only STAGE...] [--out DIR].

Each stage has a process and a deadline of its own. `result.json` and `table.txt` in DIR are rewritten after each, and
`log.txt` holds what they printed; `python -m tests.gpu_check.results DIR` makes a section of RESULTS.md of them.
Without a GPU the same stages run at small size.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from tests.gpu_check.record import LOG, TABLE
from tests.gpu_check.runner import Runner
from tests.gpu_check.stages import STAGES


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=500, metavar="SECONDS", help="for all stages (default: 500)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help=f"some of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of the result (default: gpu-check)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 if every stage passed."""
    import torch

    chosen = parse_arguments(arguments)
    about = {
        "command": f"python -m tests.gpu_check {' '.join(sys.argv[1:] if arguments is None else arguments)}".strip(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "budget_s": chosen.budget,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    (chosen.out / LOG).unlink(missing_ok=True)
    stages = [stage for stage in STAGES if chosen.only is None or stage.name in chosen.only]
    outcomes = Runner(stages, chosen.out, chosen.budget, not torch.cuda.is_available(), about).run()
    print((chosen.out / TABLE).read_text())
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
