"""Builds and stub stages on real engines, in processes of their own, with a note of who wrote which file."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

# Loaded by every Python that the tests start. What is published is renamed to its final name.
SPY = """
import os, sys
def note(event, arguments):
    if event == "os.rename" and str(arguments[1]).startswith(os.environ["SPY_ROOT"]):
        with open(os.environ["SPY_LOG"], "a") as log:
            log.write(f"{os.environ.get('NODE', 'flow')} {os.getpid()} {arguments[1]}\\n")
sys.addaudithook(note)
"""

STAGES = """
import os, subprocess, sys, time
from sdtrain.dataset.files import publish
from sdtrain.dataset.manifest import ShardReport, describe_outputs
from sdtrain.dataset.stage import plain_stage

def shards(dataset, recipe): return list(range(8))
def digest(dataset, recipe, shard): return "one"

def sleep(dataset, recipe, shards):
    for shard in shards:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        dataset.root.joinpath(f"pids-{shard}").write_text(f"{os.getpid()} {child.pid}")
        child.wait()
        yield ShardReport(stage="sleep", shard=shard, num_in=0, num_out=0)

def walk(dataset, recipe, shards):
    for shard in shards:
        time.sleep(1)
        with publish(dataset.selection(shard)) as temporary:
            temporary.write_text("rows")
        outputs = describe_outputs(dataset, [dataset.selection(shard)])
        yield ShardReport(stage="walk", shard=shard, num_in=1, num_out=1, outputs=outputs)

SLEEP = plain_stage("sleep", shards, digest, sleep)
WALK = plain_stage("walk", shards, digest, walk)
"""

STUB_FLOW = """
import sys
from pathlib import Path
import stub_stages
from prefect import flow
from flows.support.decorators import report_user_errors
from flows.support.stage_runner import StageOptions, run_stage
from sdtrain.dataset.layout import DatasetDir

@flow
@report_user_errors
def stub_flow(stage, output, shards_per_task, engine, address):
    options = StageOptions(2, shards_per_task, engine, address)
    run_stage(getattr(stub_stages, stage), DatasetDir(Path(output)), None, options)
    return output

if __name__ == "__main__":
    stage, output, shards_per_task, engine, *address = sys.argv[1:]
    stub_flow(stage, output, int(shards_per_task), engine, address[0] if address else None)
"""

# Two nodes of Ray with one CPU each, "head" and "second"; a line on standard input kills the second, its end stops all.
RAY_CLUSTER = """
import sys
from ray.cluster_utils import Cluster

def node(name):
    quiet = {"include_dashboard": False, "dashboard_agent_listen_port": 0, "temp_dir": sys.argv[1]}
    size = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    return {**quiet, **size, "env_vars": {"NODE": name}, "resources": {name: 1}}

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args=node("head"))
    second = cluster.add_node(**node("second"))
    print(cluster.address, flush=True)
    for line in sys.stdin:
        cluster.remove_node(second, allow_graceful=False)
        print("killed", flush=True)
    cluster.shutdown()
"""

BUILD = "import sys, json; from flows.build_dataset import build_dataset; build_dataset(**json.loads(sys.argv[1]))"


@dataclass(frozen=True)
class Bench:
    """Where the flows of the tests run."""

    folder: Path
    environment: dict[str, str]

    def build(self, parameters: dict[str, object]) -> Flow:
        """Starts the flow build-dataset."""
        return self._start(["-c", BUILD, json.dumps(parameters)])

    def stub(self, *arguments: object) -> Flow:
        """Starts a flow of one stub stage: its name, output, shards per task, engine, address."""
        return self._start([str(self.folder / "stub_flow.py"), *map(str, arguments)])

    def published(self) -> list[tuple[str, Path]]:
        """Which node gave which file its final name."""
        log = Path(self.environment["SPY_LOG"])
        lines = [line.split(" ", 2) for line in log.read_text().splitlines()] if log.exists() else []
        return [(node, Path(path)) for node, _, path in lines]

    def _start(self, command: list[str]) -> Flow:
        log = self.folder / f"flow-{time.monotonic_ns()}.log"
        with log.open("w") as output:
            # A shell that starts us in the background sets SIGINT to be ignored.
            process = subprocess.Popen(
                [sys.executable, *command],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        return Flow(process, log)


@dataclass
class Flow:
    """A running flow."""

    process: subprocess.Popen[bytes]
    log: Path

    def end(self, seconds: float = 240) -> str:
        """Waits for a good end; returns what was logged."""
        code = self.process.wait(seconds)
        assert code == 0, self.log.read_text()
        return self.log.read_text()

    def family(self) -> set[psutil.Process]:
        """The flow's process and all below it."""
        flow = psutil.Process(self.process.pid)
        return {flow, *flow.children(recursive=True)}

    def wait_for(self, holds: Callable[[], bool], seconds: float = 90) -> None:
        """Waits until something holds while the flow runs."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"not within {seconds} s\n{self.log.read_text()}"
            time.sleep(0.05)


class RayCluster:
    """Two nodes, in a process of their own, because Ray keeps the settings that it was imported with."""

    def __init__(self, bench: Bench) -> None:
        # Not in the bench's folder, whose name is too long for Ray's sockets.
        self._folder = tempfile.mkdtemp(prefix="ray-")
        command = [sys.executable, str(bench.folder / "ray_cluster.py"), self._folder]
        with (bench.folder / "ray_cluster.log").open("a") as log:
            self._process = subprocess.Popen(
                command, env=bench.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.address = self._read()
        assert self.address, (bench.folder / "ray_cluster.log").read_text()
        self._family = self._all()

    def kill_second(self) -> None:
        """Kills the second node."""
        self._family |= self._all()
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        assert self._read() == "killed"

    def stop(self) -> list[psutil.Process]:
        """Stops all; returns the processes that did not end, which are killed."""
        self._family |= self._all()
        assert self._process.stdin
        self._process.stdin.close()
        left = wait_for_end(self._family, 30)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        return left

    def _read(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def _all(self) -> set[psutil.Process]:
        process = psutil.Process(self._process.pid)
        return {process, *process.children(recursive=True)}


class DaskCluster:
    """A scheduler and two workers, started by Dask's commands."""

    def __init__(self, bench: Bench) -> None:
        self._started: list[subprocess.Popen[bytes]] = []
        scheduler = bench.folder / f"scheduler-{time.monotonic_ns()}.json"
        local = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(scheduler)]
        self._start(bench, "scheduler", *local)
        while not scheduler.exists() or not scheduler.read_text():
            assert self._started[0].poll() is None
            time.sleep(0.1)
        self.address = json.loads(scheduler.read_text())["address"]
        for _ in range(2):
            small = ["--nthreads", "1", "--memory-limit", "0", "--no-dashboard", "--local-directory", str(bench.folder)]
            self._start(bench, "worker", self.address, "--host", "127.0.0.1", *small)

    def stop(self) -> list[psutil.Process]:
        """Stops all; returns the processes that did not end, which are killed."""
        family = set()
        for process in self._started:
            family |= {psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)}
        for process in reversed(self._started):
            process.terminate()
        left = wait_for_end(family, 20)
        for process in self._started:
            process.wait()
        return left

    def _start(self, bench: Bench, *command: str) -> None:
        dask = Path(sys.executable).with_name("dask")
        with (bench.folder / "dask_cluster.log").open("a") as log:
            self._started.append(
                subprocess.Popen([dask, *command], env=bench.environment, stdout=log, stderr=subprocess.STDOUT)
            )


def make_bench(folder: Path, api_url: str, ray_folder: str) -> Bench:
    """Files and environment for flows in `folder`; Ray's sockets want a folder with a short name."""
    Path(ray_folder, "ray").mkdir()  # by itself Ray makes it only where a node is not told another place
    for name, text in {
        "sitecustomize": SPY,
        "stub_stages": STAGES,
        "stub_flow": STUB_FLOW,
        "ray_cluster": RAY_CLUSTER,
    }.items():
        (folder / f"{name}.py").write_text(text)
    here = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return Bench(
        folder,
        here
        | {
            "PREFECT_API_URL": api_url,
            "PREFECT_HOME": str(folder / "home"),
            "PYTHONPATH": str(folder),
            "SPY_ROOT": str(folder),
            "SPY_LOG": str(folder / "published.log"),
            "OMP_NUM_THREADS": "1",
            "DO_NOT_TRACK": "1",
            "RAY_TMPDIR": ray_folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        },
    )


def wait_for_end(processes: set[psutil.Process], seconds: float) -> list[psutil.Process]:
    """The processes that still live after so long; they are killed."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    alive = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    return alive
