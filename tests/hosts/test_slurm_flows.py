"""SLURM and Prefect together: a deployment that trains by a job, and a job that builds by a flow."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.support import slurm
from sdtrain.demo.server import serve_world
from sdtrain.demo.train_vae import build_vae
from sdtrain.demo.world import World, make_world
from sdtrain.formats.checkpoint import find_checkpoint
from tests.flows.server_fixtures import (
    Environment,
    Running,
    answers,
    artifacts_of,
    free_port,
    little_recipe,
    logs_of,
    prefect,
    run_deployment,
    state_of,
    wait_until,
)
from tests.flows.support.engine_fixtures import Bench, make_bench
from tests.hosts.slurm_fixtures import why_not
from tests.hosts.test_ray_across_hosts import digests
from tests.sdtrain.launching import BIN, REPOSITORY, log_of
from tests.training_fixtures import write_config, write_latents, write_models

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("slurm_cluster"),
    pytest.mark.skipif(why_not() is not None, reason=f"needs SLURM: {why_not()}"),
]


@pytest.fixture(scope="module")
def bench(slurm_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """With a Prefect server, and a worker that can submit jobs."""
    folder = tmp_path_factory.mktemp("prefect")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray-") as short:
        made = make_bench(folder, f"http://127.0.0.1:{port}/api", short)
        made.environment.update(
            {
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                "PREFECT_SERVER_UI_ENABLED": "false",
                "PREFECT_WORKER_QUERY_SECONDS": "1",
                "PREFECT_CLI_COLORS": "false",
                "COLUMNS": "200",
            }
        )
        with Running(["server", "start", "--port", str(port)], made.environment, folder / "server.log"):
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/api/health"), 60, folder / "server.log")
            yield made


@pytest.fixture(scope="module")
def deployed(bench: Bench) -> Iterator[Environment]:
    prefect(bench.environment, "work-pool", "create", "sdtrain", "--type", "process")
    with Running(["worker", "start", "--pool", "sdtrain"], bench.environment, bench.folder / "worker.log"):
        prefect(bench.environment, "--no-prompt", "deploy", "--all")
        yield bench.environment


def steps_of(folder: Path) -> int:
    return len(log_of(folder)) if (folder / "log.csv").exists() else 0


def test_a_deployment_trains_by_a_job_that_is_cancelled_with_it_and_goes_on(
    bench: Bench, deployed: Environment, tmp_path: Path
) -> None:
    models, output = write_models(tmp_path / "models"), tmp_path / "run"
    data = write_latents(tmp_path / "data", models)
    config = write_config(tmp_path / "toy.yaml", models, data, steps=200, checkpoint={"every": 5, "keep_last": 3})
    given = {"config": config, "data": data, "output": output, "launcher": "slurm"}
    given["slurm_options"] = "--gpus-per-node=0 --cpus-per-task=2 --time=30"
    options = [part for name, value in given.items() for part in ("-p", f"{name}={value}")]

    run = run_deployment(deployed, "train-sd-v1", *options)
    wait_until(lambda: steps_of(output) >= 10, 200, bench.folder / "worker.log")
    prefect(deployed, "flow-run", "cancel", run)
    wait_until(lambda: state_of(deployed, run)[0] == "CANCELLED", 90, bench.folder / "worker.log")
    job = slurm.recorded_job(output)
    assert job is not None
    assert slurm.state_of(job) == "CANCELLED"
    assert slurm.active_job(slurm.Job(config, [], [], output, output).name) is None
    stopped = find_checkpoint(output).layout.step
    assert 10 <= stopped < 200
    assert f"**{job}**" in artifacts_of(deployed, run)["slurm-job"]

    again = run_deployment(deployed, "train-sd-v1", *options, "--watch")
    assert state_of(deployed, again)[0] == "COMPLETED"
    assert slurm.recorded_job(output) != job
    assert f"from step {stopped} " in (output / "console.log").read_text()
    assert find_checkpoint(output).layout.step == 200
    assert "step 200/200" in logs_of(deployed, again) + (output / "console.log").read_text()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "world", num_rows=120, http_port=0, https_port=0)


def test_a_build_as_a_job_is_requeued_near_its_time_limit_and_ends_with_the_bytes_of_one_machine(
    bench: Bench, world: World, tmp_path: Path
) -> None:
    build_vae().save_pretrained(tmp_path / "vae")
    recipe, output, log = tmp_path / "little.yaml", tmp_path / "job", tmp_path / "job.log"
    recipe.write_text(little_recipe(tmp_path / "vae", samples_per_shard=6))
    given: dict[str, object] = {"recipe": str(recipe), "metadata": str(world.metadata), "workers": 2}
    with serve_world(world) as served:
        environment = bench.environment | {"SSL_CERT_FILE": str(served.world.ca), "SDTRAIN_HOME": str(REPOSITORY)}
        environment |= {"SDTRAIN_BIN": str(BIN)}
        bench.environment["SSL_CERT_FILE"] = str(served.world.ca)
        bench.build(given | {"output": str(tmp_path / "alone")}).end()

        options = ["--parsable", "--nodes=1", "--cpus-per-task=2", f"--output={log}"]
        script = REPOSITORY / "infra" / "slurm" / "build.sbatch"
        command = ["sbatch", *options, script, json.dumps(given | {"output": str(output)})]
        job = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
        wait_until(lambda: len(list((output / "manifest" / "download").glob("*.json"))) >= 2, 240, log)
        subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)  # what SLURM sends near the limit
        wait_until(lambda: "goes back into the queue" in log.read_text(), 60, log)
        done = len(list((output / "manifest" / "download").glob("*.json")))
        wait_until(lambda: slurm.state_of(job) == "COMPLETED", 400, log)
    said = log.read_text()
    assert done < len(list((output / "manifest" / "download").glob("*.json"))), f"stopped too late\n{said}"
    assert re.search(rf"download: .*\({done} finished before\)", said), said
    assert digests(output) == digests(tmp_path / "alone")
    assert any(name.startswith("latents/") for name in digests(output))
