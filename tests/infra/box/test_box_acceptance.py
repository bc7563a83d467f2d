"""The box as its users have it: built, trained, killed and taken down, on a real PostgreSQL. Minutes; `-m long`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from filters.pipeline import STAGES
from flows.support.process_tree import end_processes
from sdtrain.dataset.layout import DatasetDir
from sdtrain.demo.server import serve_world
from sdtrain.demo.train_vae import build_vae
from sdtrain.demo.world import make_world
from tests.flows.server_fixtures import ROOT, api, little_recipe, logs_of, num_runs, prefect, run_deployment, state_of
from tests.infra.box.box_fixtures import BIN, LiveBox, new_box, seconds_until, seconds_until_crashed
from tests.training_fixtures import write_config, write_latents, write_models

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

MAPPED = """
import json
import sys
import time
from prefect import flow, task
from prefect.task_runners import ThreadPoolTaskRunner

@task
def shard(number: int) -> int:
    return number

@flow(name="mapped", task_runner=ThreadPoolTaskRunner(max_workers=8))
def mapped(num_shards: int = 1000) -> int:
    return sum(future.result() for future in shard.map(range(num_shards)))

@flow(name="following")
def following() -> float:
    return time.time()

def waited_s() -> float:
    asked = time.time()
    return following() - asked

if __name__ == "__main__":
    alone = waited_s()
    started = time.time()
    mapped()
    took = time.time() - started
    print(json.dumps({"alone_s": alone, "mapped_s": took, "next_s": waited_s()}))
"""
MAPPED_DEPLOYMENTS = """
deployments:
  - {name: following, entrypoint: "mapped.py:following", work_pool: {name: cpu}}
"""
STEPS = 400
DATA = ("selection", "images", "scores", "dataset", "latents")
Digests = Callable[[DatasetDir], dict[str, str]]


@pytest.fixture(scope="module")
def box() -> Iterator[LiveBox]:
    with new_box() as box:
        assert f"source {box.directory.variables}" in box.make("up")
        yield box


@pytest.fixture(scope="module")
def build_options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Options of `prefect deployment run build-laion-aesthetics` for a world on loopback, served meanwhile."""
    folder = tmp_path_factory.mktemp("world")
    world = make_world(folder / "world", num_rows=600, http_port=0, https_port=0)
    build_vae().save_pretrained(folder / "vae")
    (folder / "little.yaml").write_text(little_recipe(folder / "vae"))
    with serve_world(world):
        trust = json.dumps({name: os.environ[name] for name in ("SSL_CERT_FILE", "no_proxy") if name in os.environ})
        yield [
            "-p",
            f"recipe={folder / 'little.yaml'}",
            "-p",
            f"metadata={world.metadata}",
            "--job-variable",
            f"env={trust}",
        ]


def finished_shards(output: Path, stage: str) -> int:
    return len(list((output / "manifest" / stage).glob("*.json")))


def test_password_is_in_no_log_and_no_command_line(box: LiveBox) -> None:
    password = box.directory.passfile.read_text().strip().rpartition(":")[2]
    assert len(password) >= 32
    assert box.directory.passfile.stat().st_mode & 0o077 == 0
    assert [log for log in box.directory.logs.iterdir() if password in log.read_text(errors="replace")] == []
    for process in box.processes():
        assert password not in " ".join(process.cmdline())
        assert password not in str(process.environ())


def test_up_again_says_that_it_is_up(box: LiveBox) -> None:
    supervisor = box.directory.lock.read_text()
    assert box.make("up").startswith(f"It is up: {box.directory.ready.read_text().strip()} ")
    assert box.directory.lock.read_text() == supervisor


def test_worker_killed_during_download_crashes_the_run_and_the_rerun_gives_the_same_bytes(
    box: LiveBox, build_options: list[str], digests: Digests, tmp_path: Path
) -> None:
    command = ("build-laion-aesthetics", *build_options)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run = run_deployment(box.environment, *command, "-p", f"output={killed}")
    seconds_until(lambda: finished_shards(killed, "download") >= 1, 120)
    flow_processes = box.processes("worker-gpu") - {box.process_of("worker-gpu")}
    box.process_of("worker-gpu").kill()
    seconds_until_crashed(box, run)
    _, alive = psutil.wait_procs(flow_processes, timeout=30)
    assert alive == []
    num_selected, num_downloaded = finished_shards(killed, "select"), finished_shards(killed, "download")
    assert num_downloaded < len(list((killed / "selection").glob("*.parquet"))), "the kill came after the download"
    assert num_selected == 1
    run_deployment(box.environment, *command, "-p", f"output={killed}", "--watch")
    run_deployment(box.environment, *command, "-p", f"output={whole}", "--watch")
    without_page = [{k: v for k, v in digests(DatasetDir(d)).items() if is_data(k)} for d in (killed, whole)]
    assert without_page[0] == without_page[1]
    assert len(without_page[0]) > 20


def is_data(name: str) -> bool:
    """Not pages, views and img2dataset's statistics, which hold absolute paths and times."""
    return name.split("/")[0] in DATA and not name.endswith("_stats.json")


def test_worker_killed_during_training_crashes_the_run_and_the_rerun_gives_the_same_weights(
    box: LiveBox, tmp_path: Path
) -> None:
    models = write_models(tmp_path / "models")
    latents = write_latents(tmp_path / "latents", models)
    config = write_config(tmp_path / "toy.yaml", models, latents, steps=STEPS, checkpoint={"every": 20, "keep_last": 2})
    command = ("train-sd-v1", "-p", f"config={config}", "-p", f"data={latents}")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    run = run_deployment(box.environment, *command, "-p", f"output={killed}")
    seconds_until(lambda: any((killed / "checkpoints").glob("step*")), 180)
    flow_processes = box.processes("worker-train") - {box.process_of("worker-train")}
    assert any("deepspeed" in " ".join(process.cmdline()) for process in flow_processes)
    box.process_of("worker-train").kill()
    seconds_until_crashed(box, run)
    _, alive = psutil.wait_procs(flow_processes, timeout=40)
    assert alive == []
    assert not (killed / "DONE").exists()
    run_deployment(box.environment, *command, "-p", f"output={killed}", "--watch")
    run_deployment(box.environment, *command, "-p", f"output={whole}", "--watch")
    assert losses(killed) == losses(whole)
    assert exported(killed, tmp_path / "a") == exported(whole, tmp_path / "b")


def losses(run: Path) -> list[str]:
    return [line.split(",")[1] for line in (run / "log.csv").read_text().splitlines()]


def exported(run: Path, target: Path) -> bytes:
    command = [sys.executable, "-m", "sdtrain.cli", "export", str(run), str(target)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=200)
    return next((target / "unet").glob("*.safetensors")).read_bytes()


def test_next_flow_starts_within_5_s_after_1000_mapped_tasks(box: LiveBox, tmp_path: Path) -> None:
    """Started by hand, and by a worker that takes it; on SQLite it waits for half a minute and more."""
    (tmp_path / "mapped.py").write_text(MAPPED)
    (tmp_path / "prefect.yaml").write_text(MAPPED_DEPLOYMENTS)
    prefect(box.environment, "--no-prompt", "deploy", "--all", cwd=tmp_path)
    print(f"load {os.getloadavg()[0]:.1f}; through a worker, before: {start_of_next(box)}")
    script = subprocess.run(
        [sys.executable, tmp_path / "mapped.py"], env=box.environment, capture_output=True, text=True, check=True
    )
    print(f"load {os.getloadavg()[0]:.1f}; through a worker, after: {(after := start_of_next(box))}")
    figures = json.loads(script.stdout.splitlines()[-1])
    print(figures)
    assert figures["next_s"] < 5
    assert after["taken_s"] < 5


def start_of_next(box: LiveBox) -> dict[str, float]:
    """Seconds until a worker has taken a run, and until its process has begun."""
    run = run_deployment(box.environment, "following")
    asked = time.monotonic()
    taken = seconds_until(lambda: state_of(box.environment, run)[0] != "SCHEDULED", 60)
    seconds_until(lambda: state_of(box.environment, run)[0] not in ("SCHEDULED", "PENDING"), 60)
    return {"taken_s": round(taken, 1), "running_s": round(time.monotonic() - asked, 1)}


def test_run_that_nobody_watches_is_crashed_by_its_missing_heartbeat(box: LiveBox, tmp_path: Path) -> None:
    """No worker, whose supervisor would see it: what is left of a lost machine."""
    (tmp_path / "lonely.py").write_text(
        "import time\nfrom prefect import flow\n@flow(name='lonely')\ndef lonely():\n    time.sleep(600)\nlonely()\n"
    )
    environment = {**box.environment, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    process = subprocess.Popen([sys.executable, tmp_path / "lonely.py"], env=environment, stderr=subprocess.DEVNULL)
    try:
        only = {"flows": {"name": {"any_": ["lonely"]}}, "flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
        seconds_until(lambda: bool(api(box.environment, "/flow_runs/filter", only)), 60)
        run = api(box.environment, "/flow_runs/filter", only)[0]["id"]
        time.sleep(3)
        process.kill()
        seconds_until_crashed(box, run)
    finally:
        end_processes({psutil.Process(process.pid)}, 1)
        process.wait()
    assert "No heartbeat for 90 s" in str(state_of(box.environment, run)[1])


def test_server_and_database_that_are_killed_come_back(box: LiveBox) -> None:
    for service in ("server", "postgres"):
        box.process_of(service).kill()
        seconds_until(lambda s=service: f"{s} had ended (killed by SIGKILL)" in box.log("supervisor"), 60)  # type: ignore[misc]

    def answers() -> bool:
        try:
            return bool(num_runs(box.environment) > 0)
        except OSError:
            return False

    took = seconds_until(answers, 90)
    print(f"the server answers {took:.1f} s later")


def test_killed_supervisor_leaves_no_process_and_the_next_up_crashes_its_runs(box: LiveBox, tmp_path: Path) -> None:
    before = num_runs(box.environment)
    run = run_deployment(box.environment, "build-demo", "-p", f"output={tmp_path}", "-p", "num_rows=2000")
    seconds_until(lambda: finished_shards(tmp_path / "data", "select") == 1, 180)
    everything = box.processes()
    os.kill(int(box.directory.lock.read_text()), signal.SIGKILL)
    started = time.monotonic()
    _, alive = psutil.wait_procs(everything, timeout=60)
    print(f"{len(everything)} processes, {len(alive)} alive after {time.monotonic() - started:.1f} s")
    assert alive == []
    box.make("up")
    seconds_until_crashed(box, run)
    assert num_runs(box.environment) == before + 1


def test_down_ends_a_run_at_work_and_up_again_has_the_history(box: LiveBox, tmp_path: Path) -> None:
    run = run_deployment(box.environment, "build-demo", "-p", f"output={tmp_path}", "-p", "num_rows=2000")
    seconds_until(lambda: finished_shards(tmp_path / "data", "select") == 1, 180)
    before, everything = num_runs(box.environment), box.processes()
    assert "Down." in box.make("down")
    assert [process for process in everything if process.is_running()] == []
    assert box.processes() == set()
    assert "was not up" in box.make("down")
    box.make("up")
    assert num_runs(box.environment) == before
    seconds_until_crashed(box, run)


def test_lost_history_costs_nothing_but_itself(box: LiveBox, build_options: list[str], tmp_path: Path) -> None:
    command = (
        "build-laion-aesthetics",
        *build_options,
        "-p",
        f"output={tmp_path / 'data'}",
        "-p",
        "limit=40",
        "--watch",
    )
    run_deployment(box.environment, *command)
    box.make("down")
    shutil.rmtree(box.directory.cluster)
    box.make("up")
    assert num_runs(box.environment) == 0
    log = logs_of(box.environment, run_deployment(box.environment, *command))
    assert log.count("finished before, nothing to do") == len(STAGES)


def test_deployments_are_spread_over_the_pools(box: LiveBox) -> None:
    pools = {d["name"]: d["work_pool_name"] for d in api(box.environment, "/deployments/filter", {})}
    assert pools["train-sd-v1"] == pools["reproduce-sd-v1"] == "train"
    assert pools["build-laion-aesthetics"] == "gpu"
    assert pools["build-demo"] == "cpu"
    assert api(box.environment, "/work_pools/train")["concurrency_limit"] == 1


def test_the_variables_make_any_shell_a_user_of_the_box(box: LiveBox) -> None:
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(box.directory.root / "client"), "SHELL": "/bin/bash"}
    said = subprocess.run(
        ["/bin/bash", "-c", f". {box.directory.variables} && prefect work-pool ls && command -v sdtrain"],
        cwd="/",
        env=bare,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    assert "train" in said
    assert str(BIN / "sdtrain") in said
