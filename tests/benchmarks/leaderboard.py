"""Appends a run of the demo to docs/LEADERBOARD.md.

    make demo && python -m tests.benchmarks.leaderboard [demo-output] [--machine NAME] [--table FILE]

The run must be a whole one of the default size; nothing is measured here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sdtrain.dataset.files import publish
from sdtrain.demo.record import RECORD, DemoRecord, read_record
from sdtrain.errors import UserError

TABLE = Path(__file__).parents[2] / "docs" / "LEADERBOARD.md"
COLUMNS = ("day", "machine", "CPU", "cores", "GPU", "commit", "seconds", "agreement", "unseen pairs", "Wh", "load")
NUM_ROWS = 2000


def main() -> int:
    """Appends the line and prints it."""
    parser = argparse.ArgumentParser(description="Appends a run of the demo to the leaderboard.")
    parser.add_argument("output", type=Path, nargs="?", default=Path("demo-output"), help="the demo's folder")
    parser.add_argument("--machine", default="", help="what to call the machine, as in: laptop, aws c7i.4xlarge")
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args()
    try:
        print(append(arguments.output, arguments.table, arguments.machine))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def append(output: Path, table: Path = TABLE, machine: str = "") -> str:
    """Appends the line of the demo in `output` to the table, once; returns it.

    UserError if there is no record of a whole demo of the default size, or the file holds no such table.
    """
    record = read_record(output)
    if record is None:
        raise UserError(
            f"{output} has no {RECORD} of a whole demo: one that was interrupted has none. Delete the folder and run "
            "`make demo` again."
        )
    if record.num_rows != NUM_ROWS or record.steps is not None:
        raise UserError(f"{output} holds a demo of another size; run it without --rows and --steps.")
    text = table.read_text() if table.exists() else ""
    if _row(COLUMNS) not in text.splitlines():
        raise UserError(f"{table} does not hold the table with the columns {', '.join(COLUMNS)}.")
    line = _row(_cells(record, machine))
    if line not in text.splitlines():
        with publish(table) as temporary:
            temporary.write_text(f"{text.rstrip(chr(10))}\n{line}\n")
    return line


def _cells(record: DemoRecord, machine: str) -> tuple[str, ...]:
    kwh = "not known" if record.kwh is None else f"{1000 * record.kwh:.2f} {_how(record.kwh_measured)}"
    shares = (f"{share:.1%}" for share in (record.seen, record.unseen))
    commit = record.commit or "none"
    return (
        *(record.day, machine, record.cpu, str(record.cores), record.gpu or "none", commit, f"{record.seconds:g}"),
        *shares,
        kwh,
        f"{record.load:g}",
    )


def _how(measured: float) -> str:
    return "measured" if measured > 0.9995 else "estimated" if not measured else f"{measured:.0%} measured"


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
