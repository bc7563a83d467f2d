"""Long work says how far it is, to whoever listens."""

import io

import pytest
from rich.console import Console

from sdtrain.dataset import progress, terminal_progress
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.progress import Step, progress_listener, report_progress, throttled
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import plain_stage


def test_every_piece_is_told_and_passed_on():
    heard = []
    with progress_listener(heard.append):
        assert list(report_progress([[1, 2], [3]], "reading", 3, "rows", len)) == [[1, 2], [3]]
    assert [(step.name, step.done, step.total, step.unit) for step in heard] == [
        ("reading", 2, 3, "rows"),
        ("reading", 3, 3, "rows"),
    ]
    assert list(report_progress([1], "reading", 1, "rows")) == [1], "nobody listens"
    assert len(heard) == 2


@pytest.mark.parametrize(
    ("done", "seconds", "said"),
    [
        (0, 0.0, "dedup: 0 of 4,000 tables"),
        (1000, 20.0, "dedup: 1,000 of 4,000 tables, about 60 s left"),
        (1000, 100.0, "dedup: 1,000 of 4,000 tables, about 5 min left"),
        (4000, 9.0, "dedup: 4,000 of 4,000 tables"),
    ],
)
def test_a_line_says_how_long_it_will_take(done, seconds, said):
    assert str(Step("dedup", done, 4000, "tables", seconds)) == said


def test_a_log_hears_of_it_seldom(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    heard = []
    listen = throttled(heard.append, 10)
    for second in range(35):
        now[0] = float(second)
        listen(Step("dedup", second, 35, "tables", 0.0))
    assert [step.done for step in heard] == [10, 20, 30]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_build_shows_it_in_the_terminal_and_in_a_log(tmp_path, monkeypatch, is_terminal):
    screen = io.StringIO()
    monkeypatch.setattr(
        terminal_progress, "Console", lambda stderr: Console(file=screen, force_terminal=is_terminal, width=200)
    )
    monkeypatch.setattr(terminal_progress, "_LINE_INTERVAL_S", 0.0)

    def run(dataset, recipe, shards):
        yield from (
            ShardReport(stage="dedup", shard=i, num_in=0, num_out=0)
            for i in report_progress(shards, "dedup", 9, "tables")
        )

    stage = plain_stage("dedup", lambda dataset, recipe: [0, 1], lambda dataset, recipe, shard: "", run)
    terminal_progress.run_with_bar(stage, DatasetDir(tmp_path), None)
    assert "dedup: 2 of 9 tables" in screen.getvalue()
