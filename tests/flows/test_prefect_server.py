"""A real Prefect server, a real worker and the commands of the README."""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from filters.pipeline import stages_of
from filters.recipe import Recipe
from sdtrain.demo.server import serve_world
from sdtrain.demo.train_vae import build_vae
from sdtrain.demo.world import make_world
from tests.flows.server_fixtures import (
    NUM_ROWS,
    SLEEPER,
    SPY,
    TEST_DEPLOYMENTS,
    TEST_FLOWS,
    Environment,
    Running,
    answers,
    api,
    artifacts_of,
    free_port,
    little_recipe,
    logs_of,
    num_runs,
    prefect,
    run_deployment,
    state_of,
    wait_until,
)

pytestmark = pytest.mark.slow
STAGES = stages_of(Recipe(name="little"))


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
    run = run_deployment(deployed, "six-shards", "-p", f"output={tmp_path}", "-p", "shards_per_task=2", "--watch")
    log = logs_of(deployed, run)
    assert "six: 6 shards, 60 in, 48 out, 12 dropped (http_404 12)" in log
    assert "six: finished before, nothing to do" in log
    tasks = api(deployed, "/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    assert sorted(task["name"] for task in tasks) == ["six-00000", "six-00002", "six-00004"]
    assert "six: 6 shards to do, 2 per task (as set)" in log
    assert artifacts_of(deployed, run) == {"progress-six": 100.0}


def test_size_of_a_batch_is_chosen_and_logged_unless_it_is_given(deployed: Environment, tmp_path: Path) -> None:
    run = run_deployment(deployed, "six-shards", "-p", f"output={tmp_path}", "-p", "shards_per_task=auto", "--watch")
    assert "six: 6 shards to do, 1 per task (to see how long one takes)" in logs_of(deployed, run)
    tasks = api(deployed, "/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
    assert sorted(task["name"] for task in tasks) == [f"six-{shard:05d}" for shard in range(6)]


def test_failed_batch_is_a_sentence_and_the_others_finish(deployed: Environment, tmp_path: Path) -> None:
    options = ("-p", f"output={tmp_path}", "-p", "shards_per_task=2", "--watch")
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
    (tmp_path / "little.yaml").write_text(little_recipe(tmp_path / "vae"))
    options = [f"recipe={tmp_path / 'little.yaml'}", f"metadata={world.metadata}", f"output={tmp_path}/{{recipe}}"]
    with serve_world(world):
        trust = json.dumps({name: os.environ[name] for name in ("SSL_CERT_FILE", "no_proxy") if name in os.environ})
        command = [*(part for option in options for part in ("-p", option)), "--job-variable", f"env={trust}"]
        first = run_deployment(deployed, "build-laion-aesthetics", *command, "--watch")
        again = run_deployment(deployed, "build-laion-aesthetics", *command, "--watch")
    artifacts = artifacts_of(deployed, first)
    assert {f"progress-{stage.name}" for stage in STAGES} | {"funnel", "dataset", "report"} == set(artifacts)
    assert api(deployed, f"/flow_runs/{first}")["name"] == "little"
    assert (tmp_path / "little" / "latents" / "00000.tar").stat().st_size > 0
    assert (tmp_path / "little" / "metadata.duckdb").exists()
    log = logs_of(deployed, again)
    assert [stage.name for stage in STAGES if f"{stage.name}: finished before, nothing to do" not in log] == []


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
        ("shards_per_task=0", "less than the minimum of 1"),
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
