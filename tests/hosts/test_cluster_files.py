"""What can be said of the files and launchers for clusters without a cluster."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import train_unet
from flows.support import slurm
from sdtrain.errors import UserError

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
SCRIPTS = sorted((INFRA / "slurm").iterdir())
# docs.skypilot.co, "SkyPilot YAML"
SKYPILOT_KEYS = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
SKYPILOT_RESOURCES = {"infra", "accelerators", "use_spot", "disk_size", "disk_tier", "job_recovery", "any_of"}


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def test_deepspeed_is_given_the_hostfile_and_its_first_host_as_master(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "# ours\nnode-1 slots=8\n\nnode-2 slots=8\n")
    command = list(map(str, train_unet._launcher_on_hosts(path, None)))
    assert command[1:5] == ["--hostfile", str(path), "--master_addr", "node-1"]
    assert "--num_gpus" not in command
    assert list(map(str, train_unet._launcher_on_hosts(path, 4)))[-2:] == ["--num_gpus", "4"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("node-1 slots=8\nnode-2\n", "Line 2 of .*'node-2'; write NAME slots=GPUS"), ("# none\n", "names no host")],
)
def test_bad_hostfile_is_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        train_unet._hosts_of(hostfile(tmp_path, text))


def test_missing_hostfile_and_open_quotes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no hostfile"):
        train_unet._hosts_of(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"slurm_options .* cannot be read: No closing quotation"):
        train_unet._words('--comment="x')


def test_without_slurm_its_launcher_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    job = slurm.Job(INFRA / "slurm" / "train.sbatch", [], [], tmp_path / "run", tmp_path / "log")
    with pytest.raises(UserError, match=r"squeue could not be started.* needs SLURM's commands"):
        slurm.run_job(job, {})


def test_jobs_of_one_folder_have_one_name_and_others_another(tmp_path: Path) -> None:
    names = [slurm.Job(Path("x"), [], [], tmp_path / f, tmp_path).name for f in ("run", "run", "other/run")]
    assert names[0] == names[1] != names[2]


def test_log_is_passed_on_in_whole_lines(tmp_path: Path) -> None:
    path, lines = tmp_path / "console.log", []
    log = slurm._Log(path)
    log.pass_on(lines.append)
    path.write_bytes(b"one\ntw")
    log.pass_on(lines.append)
    with path.open("ab") as file:
        file.write(b"o\n")
    log.pass_on(lines.append)
    assert lines == ["one", "two"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_is_valid_bash(script: Path) -> None:
    done = subprocess.run([shutil.which("bash") or "bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["train.sbatch", "train-deepspeed.sbatch", "build.sbatch"])
def test_job_is_warned_requeued_and_keeps_its_log(name: str) -> None:
    options = re.findall(r"^#SBATCH (\S+)$", (INFRA / "slurm" / name).read_text(), re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(options)
    assert any(option.startswith("--signal=B:USR1@") for option in options)


def test_ray_cluster_file_follows_rays_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    ray = pytest.importorskip("ray")
    schema: dict[str, Any] = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load((INFRA / "ray" / "cluster.yaml").read_text()), schema)


def test_skypilot_file_has_only_known_keys_and_names_its_launcher() -> None:
    task = yaml.safe_load((INFRA / "skypilot" / "train.yaml").read_text())
    assert set(task) <= SKYPILOT_KEYS
    assert set(task["resources"]) <= SKYPILOT_RESOURCES
    assert task["resources"]["use_spot"] is True
    for name in re.findall(r"\$(?:\{)?([A-Z]+)\b", task["run"]):
        assert name in task["envs"] or name.startswith("SKYPILOT"), name
    done = subprocess.run(["bash", "-n"], input=task["run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_file_that_the_page_names_exists_and_every_parameter_is_the_flows() -> None:
    page = (ROOT / "docs" / "clusters.md").read_text()
    for name in re.findall(r"infra/[\w./-]+\w", page):
        assert (ROOT / name).exists(), name
    parameters = set(train_unet.train_unet.parameters.model_dump()["properties"])
    commands = re.findall(r"run train-sd-v1 (.*?)--watch", page, re.DOTALL)
    assert commands
    assert set(re.findall(r"-p (\w+)=", commands[0])) <= parameters
