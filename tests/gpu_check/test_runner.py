"""The check's runner: what becomes of stages that fail, hang, or find no time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.gpu_check.__main__ import parse_arguments
from tests.gpu_check.record import RESULT, TABLE, read_result
from tests.gpu_check.runner import Runner
from tests.gpu_check.stage import Limits, Outcome, Stage
from tests.gpu_check.stages import STAGES

REPOSITORY = Path(__file__).parents[2]


def stage(name: str, fake: str, least_s: float = 0.0, most_s: float = 60.0, **more: object) -> Stage:
    return Stage(name, f"the stage {name}", f"tests.gpu_check.fakes:{fake}", small=Limits(least_s, most_s), **more)


def run(folder: Path, *stages: Stage, budget_s: float = 100.0) -> dict[str, Outcome]:
    outcomes = Runner(stages, folder, budget_s, is_small=True, about={"command": "fake"}).run()
    written = read_result(folder)["stages"]
    assert written == [outcome.as_json() for outcome in outcomes]
    table = (folder / TABLE).read_text()
    assert all(outcome.title in table and outcome.status in table for outcome in outcomes)
    return {outcome.name: outcome for outcome in outcomes}


def test_a_failing_stage_is_told_with_its_traceback_and_the_next_ones_run(tmp_path: Path) -> None:
    stages = (
        stage("before", "fails"),
        stage("limit", "breaks_a_limit"),
        stage("dead", "dies"),
        stage("lacking", "lacks_a_module"),
        stage("after", "passes"),
    )
    found = run(tmp_path, *stages)
    assert [outcome.status for outcome in found.values()] == ["failed", "failed", "failed", "modules missing", "passed"]
    assert 'raise ValueError("a planted mistake")' in found["before"].problem
    assert found["before"].figures == {"measured": 1}
    assert "0.3 is more than 0.1" in found["limit"].problem
    assert found["limit"].figures == {"measured_after": 2}
    assert "code 7" in found["dead"].problem
    assert "a_module_that_nobody_has" in found["lacking"].problem
    assert found["after"].figures == {"answer": 42, "earlier": {"measured": 1}}


def test_a_stage_without_its_modules_is_named_with_all_of_them_and_not_started(tmp_path: Path) -> None:
    lacking = stage("lacking", "dies", modules=("json", "no_such_one", "nor_this"))
    found = run(tmp_path, lacking, stage("after", "passes"))
    assert found["lacking"].status == "modules missing"
    assert found["lacking"].problem == "not installed: no_such_one, nor_this"
    assert found["after"].status == "passed"


def test_a_hanging_stage_is_ended_with_all_its_processes_and_keeps_its_figures(tmp_path: Path) -> None:
    found = run(tmp_path, stage("hanging", "hangs", most_s=8.0), stage("after", "passes"))
    assert found["hanging"].status == "timed out"
    assert "ended after 8.0 s" in found["hanging"].problem
    assert found["after"].status == "passed"
    assert not processes_with(found["hanging"].figures["begun"])


def test_what_does_not_fit_the_budget_is_listed_as_skipped(tmp_path: Path) -> None:
    stages = (stage("too long", "passes", least_s=200), stage("short", "passes", least_s=1))
    found = run(tmp_path, *stages, budget_s=60)
    assert (found["too long"].status, found["short"].status) == ("skipped", "passed")
    assert found["too long"].problem == "needs 200 s, and 60 s are left of the budget"


def test_a_hanging_stage_leaves_the_later_ones_their_least_time(tmp_path: Path) -> None:
    stages = (stage("hanging", "hangs", 1, 1000), stage("never", "passes", 900), stage("after", "passes", 30))
    found = run(tmp_path, *stages, budget_s=46)
    assert 7 < found["hanging"].limit_s <= 8
    assert [outcome.status for outcome in found.values()] == ["timed out", "skipped", "passed"]


def test_a_check_killed_between_two_stages_leaves_whole_files_and_no_process(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tests.gpu_check.test_runner import run, stage
run(Path({str(tmp_path)!r}), stage("done", "passes"), stage("hanging", "hangs"), stage("after", "passes"))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    deadline = time.monotonic() + 100
    while not (begun := figures_of(tmp_path, "hanging").get("begun")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    stages = {entry["name"]: entry["status"] for entry in read_result(tmp_path)["stages"]}
    assert stages == {"done": "passed", "hanging": "running"}
    assert "the stage done" in (tmp_path / TABLE).read_text()
    while processes_with(begun) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_with(begun)


def figures_of(folder: Path, name: str) -> dict[str, object]:
    return next((e["figures"] for e in read_result(folder).get("stages", []) if e["name"] == name), {})


def processes_with(word: object) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(word) in argument for argument in process.cmdline()) and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def test_only_takes_known_stages_and_keeps_their_order(tmp_path: Path) -> None:
    chosen = parse_arguments(["--only", "score", "machine", "--budget", "7"])
    assert (chosen.only, chosen.budget) == (["score", "machine"], 7)
    with pytest.raises(SystemExit):
        parse_arguments(["--only", "everything"])
    command = [sys.executable, "-m", "tests.gpu_check", "--only", "sample", "machine", "--budget", "0.5"]
    done = subprocess.run([*command, "--out", tmp_path], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    content = json.loads((tmp_path / RESULT).read_text())
    assert [(s["name"], s["status"]) for s in content["stages"]] == [("machine", "skipped"), ("sample", "skipped")]
    assert content["budget_s"] == 0.5
    assert content["command"].endswith(f"--only sample machine --budget 0.5 --out {tmp_path}")


def test_ten_stages_have_what_500_seconds_give_them() -> None:
    assert len(STAGES) == 10
    assert sum(stage.on_gpu.least_s for stage in STAGES) <= 500 - 60  # each ends a little late
    assert sum(stage.small.least_s for stage in STAGES) <= 300 - 60
