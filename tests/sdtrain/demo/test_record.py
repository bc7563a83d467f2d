"""The record of a whole demo, and its line on the leaderboard."""

import json

import pytest

from sdtrain.demo.checker import Agreement
from sdtrain.demo.record import RECORD, DemoClock, read_record
from sdtrain.errors import UserError
from sdtrain.impact.energy import EnergyLog, Spent
from tests.benchmarks import leaderboard

VERDICTS = {"seen": Agreement(1.0, 0.8, 0.75, 40), "unseen": Agreement(0.5, 0.5, 0.25, 8)}


def recorded(root, num_rows=2000, steps=None):
    """The record of a demo with half an hour of training on four busy cores, and an hour of downloads."""
    clock = DemoClock(root)
    run = root / "training"
    run.mkdir(parents=True)
    EnergyLog(run / "energy.csv").add(Spent("a", 900, "AMD EPYC", 1, 1, 0, 0.5, 0.0, 0.0, 0.5, 0.0, 0.0, 2.0))
    clock.record(VERDICTS, run, root / "data", num_rows, steps)
    return clock


def test_a_whole_demo_leaves_a_record_of_where_and_how_well_it_ran(tmp_path):
    recorded(tmp_path / "demo")
    found = read_record(tmp_path / "demo")
    assert (found.seen, found.unseen, found.num_rows, found.steps) == (0.75, 0.25, 2000, None)
    assert found.kwh == pytest.approx(0.014)  # two core-hours at 7 W; no data stage is recorded
    assert (found.kwh_measured, found.cores > 0, bool(found.cpu), found.seconds >= 0) == (0.0, True, True, True)


def test_a_demo_that_goes_on_keeps_the_record_of_the_whole_one(tmp_path):
    recorded(tmp_path / "demo")
    before = (tmp_path / "demo" / RECORD).read_bytes()
    DemoClock(tmp_path / "demo").record(VERDICTS, tmp_path, tmp_path, 2000, None)
    assert (tmp_path / "demo" / RECORD).read_bytes() == before
    (tmp_path / "left" / "world").mkdir(parents=True)
    DemoClock(tmp_path / "left").record(VERDICTS, tmp_path, tmp_path, 2000, None)
    assert read_record(tmp_path / "left") is None


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "LEADERBOARD.md"
    path.write_text(leaderboard.TABLE.read_text())
    return path


def test_the_command_appends_its_line_once(tmp_path, table, monkeypatch, capsys):
    recorded(tmp_path / "demo")
    before = table.read_text()
    arguments = ["leaderboard", str(tmp_path / "demo"), "--machine", "a | laptop", "--table", str(table)]
    monkeypatch.setattr("sys.argv", arguments)
    assert leaderboard.main() == leaderboard.main() == 0
    added = table.read_text().removeprefix(before.rstrip("\n") + "\n")
    assert added.count("\n") == 1
    assert added == capsys.readouterr().out.splitlines()[0] + "\n"
    cells = [cell.strip() for cell in added.strip().strip("|").replace("\\|", "/").split("|")]
    assert len(cells) == len(leaderboard.COLUMNS)
    named = dict(zip(leaderboard.COLUMNS, cells, strict=True))
    assert (named["machine"], named["agreement"], named["unseen pairs"]) == ("a / laptop", "75.0%", "25.0%")
    assert named["Wh"] == "14.00 estimated"


@pytest.mark.parametrize(
    ("sizes", "message"), [(None, "no record.json of a whole demo"), ((100, None), "another size"), ((2000, 5), "size")]
)
def test_other_demos_have_no_line(tmp_path, table, sizes, message):
    if sizes:
        recorded(tmp_path / "demo", *sizes)
    before = table.read_text()
    with pytest.raises(UserError, match=message):
        leaderboard.append(tmp_path / "demo", table)
    assert table.read_text() == before


def test_a_file_without_the_table_is_left_alone(tmp_path):
    recorded(tmp_path / "demo")
    (tmp_path / "other.md").write_text("# Other\n")
    with pytest.raises(UserError, match="does not hold the table"):
        leaderboard.append(tmp_path / "demo", tmp_path / "other.md")
    (tmp_path / "demo" / RECORD).write_text(json.dumps({"seconds": 1}))
    with pytest.raises(UserError, match="whole demo"):
        leaderboard.append(tmp_path / "demo")
