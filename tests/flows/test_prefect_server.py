"""A real Prefect server, a real worker and the commands of the README."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from filters.road import STAGE_NAMES
from sdtrain.demo.server import serve_world
from sdtrain.demo.train_vae import build_vae
from sdtrain.demo.world import make_world

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PREFECT = Path(sys.executable).with_name("prefect")

# Loaded by every Python that the tests start: writes down each attempt to reach another machine.
SPY = """
import os, socket, sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = arguments[1] if event == "socket.connect" else arguments
        host = address[0] if isinstance(address, tuple) else None
        if isinstance(host, str) and not host.startswith("127.") and host not in ("localhost", "::1", "0.0.0.0", ""):
            with open(os.environ["SPY_LOG"], "a") as log:
                log.write(f"{event} {host} {sys.argv}\\n")
sys.addaudithook(note)
"""

SLEEPER = """
import os, pathlib, sys, time
pathlib.Path(os.environ["RANKS_DIR"], f"rank-{os.environ['RANK']}").write_text(str(os.getpid()))
print("step 1/1000", flush=True)
time.sleep(600)
"""

TEST_FLOWS = """
import subprocess, sys
from pathlib import Path
from prefect import flow
from flows.failure import fails_with_a_sentence
from flows.stages import StageOptions, run_stage
from flows.train_unet import train
from sdtrain.data.dataset import DatasetDir
from sdtrain.data.files import publish
from sdtrain.data.manifest import ShardReport, describe_outputs, fingerprint
from sdtrain.data.stage import Stage
from sdtrain.errors import UserError

def run(dataset, bad_shard, shards):
    for shard in shards:
        if shard == bad_shard:
            raise UserError(f"Shard {shard} is bad: mend it.")
        path = dataset.selection(shard)
        with publish(path) as temporary:
            temporary.write_text("rows")
        outputs = describe_outputs(dataset, [path])
        yield ShardReport(stage="six", shard=shard, num_in=10, num_out=8, dropped={"http_404": 2}, outputs=outputs)

SIX = Stage("six", lambda *_: list(range(6)), lambda *_: fingerprint("six/1", None), run)

@flow(name="six-shards")
@fails_with_a_sentence
def six_shards(output: str, bad_shard: int = -1) -> str:
    for _ in range(2):
        run_stage(SIX, DatasetDir(Path(output)), bad_shard, StageOptions(workers=2, shards_per_task=2))
    return output

def sleep(dataset, recipe, shards):
    for shard in shards:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        dataset.root.joinpath(f"child-{shard}").write_text(str(child.pid))
        if child.wait() != 0:
            raise UserError("The child was ended.")
        yield ShardReport(stage="sleep", shard=shard, num_in=0, num_out=0)

SLEEP = Stage("sleep", lambda *_: list(range(6)), lambda *_: fingerprint("sleep/1", None), sleep)

@flow(name="sleeping-stage")
@fails_with_a_sentence
def sleeping_stage(output: str) -> str:
    run_stage(SLEEP, DatasetDir(Path(output)), None, StageOptions(workers=2))
    return output

@flow(name="sleeping-training")
@fails_with_a_sentence
def sleeping_training(output: str) -> str:
    return train("tiny", "data", output, num_gpus=2, script=Path(__file__).with_name("sleeper.py"))
"""

TEST_DEPLOYMENTS = """
deployments:
  - {name: six-shards, entrypoint: "test_flows.py:six_shards", work_pool: {name: sdtrain}}
  - {name: sleeping-stage, entrypoint: "test_flows.py:sleeping_stage", work_pool: {name: sdtrain}}
  - {name: sleeping-training, entrypoint: "test_flows.py:sleeping_training", work_pool: {name: sdtrain}}
"""

NUM_ROWS = 60
LITTLE_RECIPE = """
name: little
select: {{rules: {{min_side: 512, min_aesthetic: 5.0, max_watermark: 0.5}}, samples_per_shard: 20}}
download: {{image_size: 64, allow_private_hosts: true, timeout_s: 2, retries: 1, connections: 8}}
score:
  clip_model: ViT-demo
  clip_weights: "random:0"
  aesthetic_weights: "random:0"
  watermark_weights: "random:0"
  safety_weights: "random:0"
duplicates: {{level: perceptual}}
keep: {{rules: {{min_side: 512}}}}
pack: {{samples_per_shard: 10}}
encode: {{vae: {vae}, resolution: 64}}
"""

Environment = dict[str, str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefect")
    (folder / "spy").mkdir()
    (folder / "spy" / "sitecustomize.py").write_text(SPY)
    (folder / "flows").mkdir()
    (folder / "flows" / "test_flows.py").write_text(TEST_FLOWS)
    (folder / "flows" / "sleeper.py").write_text(SLEEPER)
    (folder / "flows" / "prefect.yaml").write_text(TEST_DEPLOYMENTS)
    return folder


@pytest.fixture(scope="module")
def environment(folder: Path) -> Environment:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_CLI_COLORS": "false",
        "DO_NOT_TRACK": "1",
        "COLUMNS": "200",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "SPY_LOG": str(folder / "outside.log"),
        "RANKS_DIR": str(folder),
        "PYTHONPATH": str(folder / "spy"),
    }


@pytest.fixture(scope="module")
def server(folder: Path, environment: Environment) -> Iterator[Environment]:
    port = re.findall(r":(\d+)/", environment["PREFECT_API_URL"])[0]
    with Running(["server", "start", "--port", port], environment, folder / "server.log"):
        wait_until(lambda: answers(environment["PREFECT_API_URL"] + "/health"), 60, folder / "server.log")
        prefect(environment, "work-pool", "create", "sdtrain", "--type", "process")
        yield environment


@pytest.fixture(scope="module")
def worker(folder: Path, server: Environment) -> Iterator[Environment]:
    with Running(["worker", "start", "--pool", "sdtrain"], server, folder / "worker.log"):
        yield server


@pytest.fixture(scope="module")
def deployed(folder: Path, worker: Environment) -> Environment:
    prefect(worker, "--no-prompt", "deploy", "--all")
    prefect(worker, "--no-prompt", "deploy", "--all", cwd=folder / "flows")
    return worker


class Running:
    """A long-running `prefect` command that ends with the block, with all of its children."""

    def __init__(self, arguments: list[str], environment: Environment, log: Path):
        self._arguments, self._environment, self._log = arguments, environment, log

    def __enter__(self) -> None:
        # A shell that starts us in the background sets SIGINT to be ignored; Prefect stops through SIGINT.
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                [PREFECT, *self._arguments],
                cwd=ROOT,
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def __exit__(self, *_: Any) -> None:
        tree = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        self._process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=20)
        for process in alive:
            process.kill()
        self._process.wait()


def prefect(environment: Environment, *arguments: str, cwd: Path = ROOT, fails: bool = False) -> str:
    done = subprocess.run([PREFECT, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode != 0) == fails, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def api(environment: Environment, path: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(environment["PREFECT_API_URL"] + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def num_runs(environment: Environment) -> int:
    return int(api(environment, "/flow_runs/count", {}))


def run_deployment(environment: Environment, name: str, *options: str, fails: bool = False) -> str:
    """The id of the run that `prefect deployment run` created."""
    said = prefect(environment, "deployment", "run", name, *options, fails=fails)
    return re.findall(r"UUID: (\S+)", said)[0]


def state_of(environment: Environment, run_id: str) -> tuple[str, str | None]:
    state = api(environment, f"/flow_runs/{run_id}")["state"]
    return state["type"], state["message"]


def artifacts_of(environment: Environment, run_id: str) -> dict[str, Any]:
    only = {"artifacts": {"flow_run_id": {"any_": [run_id]}}}
    return {artifact["key"]: artifact["data"] for artifact in api(environment, "/artifacts/filter", only)}


def logs_of(environment: Environment, run_id: str) -> str:
    only = {"logs": {"flow_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC"}
    return "\n".join(line["message"] for line in api(environment, "/logs/filter", only))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


def wait_until(holds: Callable[[], bool], seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s; {log}:\n{log.read_text()}"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_deploy_registers_every_deployment_of_the_repository(deployed: Environment) -> None:
    names = {deployment["name"] for deployment in api(deployed, "/deployments/filter", {})}
    assert names >= {
        "build-laion-aesthetics",
        "build-laion-high-resolution",
        "build-laion2b-en",
        "build-demo",
        "reproduce-sd-v1",
        "train-sd-v1",
    }


def test_stages_run_in_batches_with_progress_and_are_not_run_again(deployed: Environment, tmp_path: Path) -> None:
    run = run_deployment(deployed, "six-shards", "-p", f"output={tmp_path}", "--watch")
    log = logs_of(deployed, run)
    assert "six: 6 shards, 60 in, 48 out, 12 dropped (http_404 12)" in log
    assert "six: finished before, nothing to do" in log
    tasks = api(deployed, "/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    assert sorted(task["name"] for task in tasks) == ["six-00000", "six-00002", "six-00004"]
    assert artifacts_of(deployed, run) == {"progress-six": 100.0}


def test_failed_batch_is_a_sentence_and_the_others_finish(deployed: Environment, tmp_path: Path) -> None:
    options = ("-p", f"output={tmp_path}", "--watch")
    run = run_deployment(deployed, "six-shards", *options, "-p", "bad_shard=3", fails=True)
    assert state_of(deployed, run) == ("FAILED", "Shard 3 is bad: mend it.")
    assert "test_flows.py" not in logs_of(deployed, run)  # no traceback from the depths
    run = run_deployment(deployed, "six-shards", *options)
    assert "six: 1 shard (5 finished before), 10 in" in logs_of(deployed, run)


def test_bare_and_native_names_both_create_a_run(deployed: Environment, folder: Path) -> None:
    before = num_runs(deployed)
    later = ("--start-in", "in 2 hours")
    for name in ("build-laion-aesthetics", "build-dataset/build-laion-aesthetics"):
        run_deployment(deployed, name, *later)
    elsewhere = deployed | {"PREFECT_PLUGINS_ENABLED": "true"}
    prefect(elsewhere, "deployment", "run", "build-laion-aesthetics", *later, cwd=folder)
    assert num_runs(deployed) == before + 3


def test_build_laion_aesthetics_runs_every_stage_once(deployed: Environment, tmp_path: Path) -> None:
    """Real download, scores and latents of a small world on loopback; only the models are random."""
    world = make_world(tmp_path / "world", num_rows=NUM_ROWS, http_port=0, https_port=0)
    build_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "little.yaml").write_text(LITTLE_RECIPE.format(vae=tmp_path / "vae"))
    options = [f"recipe={tmp_path / 'little.yaml'}", f"metadata={world.metadata}", f"output={tmp_path}/{{recipe}}"]
    with serve_world(world):
        trust = json.dumps({name: os.environ[name] for name in ("SSL_CERT_FILE", "no_proxy") if name in os.environ})
        command = [*(part for option in options for part in ("-p", option)), "--job-variable", f"env={trust}"]
        first = run_deployment(deployed, "build-laion-aesthetics", *command, "--watch")
        again = run_deployment(deployed, "build-laion-aesthetics", *command, "--watch")
    artifacts = artifacts_of(deployed, first)
    assert {f"progress-{name}" for name in STAGE_NAMES} | {"funnel", "dataset", "report"} == set(artifacts)
    assert api(deployed, f"/flow_runs/{first}")["name"] == "little"
    assert (tmp_path / "little" / "latents" / "00000.tar").stat().st_size > 0
    assert (tmp_path / "little" / "metadata.duckdb").exists()
    log = logs_of(deployed, again)
    assert [name for name in STAGE_NAMES if f"{name}: finished before, nothing to do" not in log] == []


def test_unknown_name_is_answered_with_close_ones(deployed: Environment) -> None:
    said = prefect(deployed, "deployment", "run", "build-laion-aesthetic", fails=True)
    assert "Did you mean build-laion-aesthetics" in said
    assert "Deployment 'build-laion-aesthetic' not found!" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ("recipe=laion-aesthetic", "laion-high-resolution"),
        ("limit=0", "minimum"),
        ("min_aesthetic=65", "maximum of 10"),
        ("max_watermark=0", "minimum"),
        ("workers=zero", "integer"),
        ("minimum_side=512", "min_side"),
    ],
)
def test_bad_parameter_is_refused_before_a_run_is_created(deployed: Environment, parameter: str, said: str) -> None:
    before = num_runs(deployed)
    assert said in prefect(deployed, "deployment", "run", "build-laion-aesthetics", "-p", parameter, fails=True)
    assert num_runs(deployed) == before


def test_cancelled_training_leaves_no_process(deployed: Environment, folder: Path, tmp_path: Path) -> None:
    """The launcher and its ranks are the real ones; only the script sleeps."""
    run = run_deployment(deployed, "sleeping-training", "-p", f"output={tmp_path}")
    wait_until(lambda: len(list(folder.glob("rank-*"))) == 2, 90, folder / "worker.log")
    ranks = [psutil.Process(int(file.read_text())) for file in folder.glob("rank-*")]
    tree = [parent for rank in ranks for parent in rank.parents() if "deepspeed" in " ".join(parent.cmdline())]
    assert len(set(tree)) == 2
    prefect(deployed, "flow-run", "cancel", run)
    _, alive = psutil.wait_procs([*ranks, *tree], timeout=40)
    assert alive == []
    wait_until(lambda: state_of(deployed, run)[0] == "CANCELLED", 30, folder / "worker.log")


def test_cancelled_stage_ends_its_children_and_begins_no_further_batch(
    deployed: Environment, folder: Path, tmp_path: Path
) -> None:
    run = run_deployment(deployed, "sleeping-stage", "-p", f"output={tmp_path}")
    wait_until(lambda: len(list(tmp_path.glob("child-*"))) == 2, 60, folder / "worker.log")
    time.sleep(0.2)
    children = [psutil.Process(int(file.read_text())) for file in tmp_path.glob("child-*")]
    prefect(deployed, "flow-run", "cancel", run)
    _, alive = psutil.wait_procs(children, timeout=25)
    assert alive == []
    wait_until(lambda: state_of(deployed, run)[0] == "CANCELLED", 30, folder / "worker.log")
    assert len(list(tmp_path.glob("child-*"))) == 2


def test_nothing_reached_out_to_the_network(deployed: Environment, folder: Path) -> None:
    """Last in the file: over all commands, server and worker of the tests above."""
    assert not (folder / "outside.log").exists(), (folder / "outside.log").read_text()
