"""What the tests of a real Prefect server are made of: little flows, a server and a worker that run, and questions."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

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
from flows.support.batches import ShardsPerTask
from flows.support.decorators import report_user_errors
from flows.support.stage_runner import StageOptions, run_stage
from flows.train_unet import train
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.files import publish
from sdtrain.dataset.manifest import describe_outputs
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import plain_stage
from sdtrain.dataset.stage import Stage
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

SIX = plain_stage("six", lambda *_: list(range(6)), lambda *_: fingerprint("six/1", None), run)

@flow(name="six-shards")
@report_user_errors
def six_shards(output: str, bad_shard: int = -1, shards_per_task: ShardsPerTask = "auto") -> str:
    for _ in range(2):
        run_stage(SIX, DatasetDir(Path(output)), bad_shard, StageOptions(workers=2, shards_per_task=shards_per_task))
    return output

def sleep(dataset, recipe, shards):
    for shard in shards:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        dataset.root.joinpath(f"child-{shard}").write_text(str(child.pid))
        if child.wait() != 0:
            raise UserError("The child was ended.")
        yield ShardReport(stage="sleep", shard=shard, num_in=0, num_out=0)

SLEEP = plain_stage("sleep", lambda *_: list(range(6)), lambda *_: fingerprint("sleep/1", None), sleep)

@flow(name="sleeping-stage")
@report_user_errors
def sleeping_stage(output: str) -> str:
    run_stage(SLEEP, DatasetDir(Path(output)), None, StageOptions(workers=2, shards_per_task=1))
    return output

@flow(name="sleeping-training")
@report_user_errors
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
_LITTLE_RECIPE = """
name: little
select: {{rules: {{min_side: 512, min_aesthetic: 5.0, max_watermark: 0.5}}, samples_per_shard: {samples_per_shard}}}
download: {{image_size: 64, allow_private_hosts: true, timeout_s: 3, retries: 1, connections: 8}}
score:
  clip_model: ViT-demo
  clip_weights: "random:0"
  aesthetic_weights: "random:0"
  watermark_weights: "random:0"
  safety_weights: "random:0"
duplicates: {{level: perceptual}}
decide: {{rules: {{min_side: 512}}}}
pack: {{samples_per_shard: 10}}
encode: {{vae: {vae}, resolution: 64}}
"""

Environment = dict[str, str]


def little_recipe(vae: Path, samples_per_shard: int = 20) -> str:
    """A recipe of a small world, with networks of random weights, as YAML."""
    return _LITTLE_RECIPE.format(vae=vae, samples_per_shard=samples_per_shard)


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
