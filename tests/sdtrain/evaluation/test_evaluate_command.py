import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.cli.evaluate import command_of
from sdtrain.errors import UserError
from sdtrain.evaluation.protocol import Protocol
from sdtrain.evaluation.sweep import plan
from sdtrain.evaluation.workers import run_sweep
from tests.sdtrain.evaluation.evaluation_fixtures import digests

SDTRAIN = Path(sys.executable).with_name("sdtrain")


def arguments(protocol, run, output):
    return [*shlex.split(command_of(run, protocol))[1:], "--output", str(output)]


def test_the_command_prints_every_number_with_its_protocol(little, run, tmp_path):
    result = CliRunner().invoke(app, arguments(little, run, tmp_path / "out"))
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    reference = f"reference_sha256: {written['protocol']['reference_sha256']}"
    for line in ("num_steps: 2", "sampler: plms", "seed: 0", reference):
        assert line in result.stdout
    for row in written["rows"]:
        assert f"{row['agreement_demo_checker']:.4g} ±" in result.stdout
    assert "curve.png" in result.stdout


def test_the_models_own_folder_is_the_default_and_only_a_runs(little, run, tmp_path):
    without_output = [part for part in arguments(little, run, "OUT") if part not in ("--output", "OUT")]
    assert CliRunner().invoke(app, without_output).exit_code == 0
    assert (run / "evaluation" / "results.json").exists()
    result = CliRunner().invoke(app, [*without_output, str(tmp_path)])
    assert isinstance(result.exception, UserError)
    assert "--output" in str(result.exception)


def test_every_setting_of_the_protocol_is_an_option_with_its_description():
    text = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "400", "TERM": "dumb"}).output
    short = {"num_prompts": "num", "num_steps": "steps", "networks": "networks,--network"}
    for name, field in Protocol.model_fields.items():
        assert f"--{short.get(name, name).replace('_', '-')} " in text
        assert field.description in text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--scales", "1,two"], "--scales '1,two'"),
        (["--prompts", "nothing.txt"], "nothing.txt cannot be read"),
        (["--reference", "nothing"], "There is no nothing"),
        (["--networks", "inception", "--network-weights", "w.pth"], "There are no weights 'w.pth'"),
        (["--agreement", "clip", "--clip-weights", "w.pt"], "There are no weights 'w.pt'"),
        (["--num", "7"], "has 6 prompts, too few for 7"),
    ],
)
def test_mistakes_are_a_sentence_before_anything_is_drawn(little, run, tmp_path, change, sentence):
    result = CliRunner().invoke(app, [*arguments(little, run, tmp_path / "out"), *change])
    assert isinstance(result.exception, UserError), result.output
    assert sentence in str(result.exception)
    assert not list((tmp_path / "out").glob("samples/**/*.tar"))


@pytest.fixture
def one_thread(monkeypatch):
    """Sums in the order in which a process with one thread adds them."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_killed_with_two_processes_and_gone_on_with_one_it_ends_with_the_bytes_of_an_undisturbed_one(
    little, run, tmp_path, one_thread
):
    """So two ranks and one rank draw identical images, and what was finished is not drawn again."""
    protocol = little.model_copy(update={"part_size": 2, "num_steps": 20})
    killed, output = tmp_path / "killed", tmp_path / "output.log"
    command = [SDTRAIN, *arguments(protocol, run, killed), "--processes", "2"]
    with output.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    family = [psutil.Process(process.pid)]
    try:
        deadline = time.monotonic() + 150
        while not list(killed.glob("manifest/draw-*/*.json")):
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.02)
        family += family[0].children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(family[1:], timeout=30)
        assert alive == []  # its processes end with it
    finally:
        for member in family:
            if member.is_running():
                member.kill()
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("samples/**/*.tar")}
    assert 1 <= len(finished) < 6
    entries = {path.stem for path in killed.glob("manifest/draw-*/*.json")}

    run_sweep(plan(protocol, [run], killed), say=lambda line: None)
    run_sweep(plan(protocol, [run], tmp_path / "whole"), say=lambda line: None)
    assert digests(killed) == digests(tmp_path / "whole")
    kept = [path for path, time_ns in finished.items() if path.stat().st_mtime_ns == time_ns]
    assert len(kept) >= len(entries)
    assert not list(killed.rglob("*.partial"))
