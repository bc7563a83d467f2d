"""Real builds in processes, on Dask and on two nodes of Ray: the bytes of threads, and nothing left behind."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

from sdtrain.demo.server import serve_world
from sdtrain.demo.train_vae import build_vae
from sdtrain.demo.world import make_world
from tests.flows.server_fixtures import little_recipe
from tests.flows.support.engine_fixtures import Bench, DaskCluster, RayCluster, make_bench, wait_for_end

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

RAY_AGENTS = ("ray::DashboardA", "ray::RuntimeEnv")
"""They take more than a minute to see that all others have ended."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        short = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        with short as ray_folder, prefect_test_harness(server_startup_timeout=120):
            yield make_bench(tmp_path_factory.mktemp("bench"), str(PREFECT_API_URL.value()), ray_folder)


@pytest.fixture(scope="module")
def parameters(bench: Bench) -> Iterator[dict[str, object]]:
    """Of a build of a small world that is on line meanwhile."""
    world = make_world(bench.folder / "world", num_rows=60, http_port=0, https_port=0)
    build_vae().save_pretrained(bench.folder / "vae")
    recipe = bench.folder / "little.yaml"
    recipe.write_text(little_recipe(bench.folder / "vae", samples_per_shard=6))
    with serve_world(world) as _, pytest.MonkeyPatch.context() as patch:
        for name in ("SSL_CERT_FILE", "no_proxy"):
            if name in os.environ:
                patch.setitem(bench.environment, name, os.environ[name])
        yield {"recipe": str(recipe), "metadata": str(world.metadata), "workers": 2}


@pytest.fixture(scope="module")
def expected(bench: Bench, parameters: dict[str, object]) -> dict[str, str]:
    """Digests of the same build with threads."""
    bench.build(parameters | {"output": str(bench.folder / "threads")}).end()
    found = digests(bench.folder / "threads")
    assert any(name.startswith("latents/") for name in found)
    return found


def digests(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.suffix in (".tar", ".parquet")]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


@pytest.mark.parametrize("engine", ["processes", "dask"])
def test_engine_of_this_machine_gives_the_bytes_of_threads(
    engine: str, bench: Bench, parameters: dict[str, object], expected: dict[str, str]
) -> None:
    output = bench.folder / engine
    bench.build(parameters | {"output": str(output), "engine": engine}).end()
    assert digests(output) == expected
    pids = {pid for _, pid, path in _notes(bench) if output in Path(path).parents and "images" in path}
    assert len(pids) == 2, "both workers were to download"


def _notes(bench: Bench) -> list[list[str]]:
    return [line.split(" ", 2) for line in (bench.folder / "published.log").read_text().splitlines()]


def test_flow_tries_failed_rows_again_as_a_step_of_its_own(
    bench: Bench, parameters: dict[str, object], expected: dict[str, str]
) -> None:
    output = shutil.copytree(bench.folder / "threads", bench.folder / "again")
    log = bench.build(parameters | {"output": str(output), "retry_failed": True}).end()
    assert re.search(r"Task run 'retry-failed' - retry-failed: 0 of \d+ failed rows recovered", log)
    assert "score: finished before, nothing to do" in log
    assert digests(output) == expected


@pytest.fixture
def ray_cluster(bench: Bench) -> Iterator[RayCluster]:
    cluster = RayCluster(bench)
    yield cluster
    assert cluster.stop() == []


def nodes_of(bench: Bench, folder: Path) -> set[str]:
    return {node for node, path in bench.published() if folder == path.parent}


def test_ray_on_two_nodes_gives_the_bytes_of_threads(
    bench: Bench, parameters: dict[str, object], expected: dict[str, str], ray_cluster: RayCluster
) -> None:
    output = bench.folder / "ray"
    given = parameters | {"output": str(output), "engine": "ray", "engine_address": ray_cluster.address}
    bench.build(given).end()
    assert digests(output) == expected
    for folder in ("images", "latents"):
        assert nodes_of(bench, output / folder) >= {"head", "second"}


@pytest.mark.long
def test_killed_node_costs_no_byte(
    bench: Bench, parameters: dict[str, object], expected: dict[str, str], ray_cluster: RayCluster
) -> None:
    output = bench.folder / "killed"
    given = parameters | {"output": str(output), "engine": "ray", "engine_address": ray_cluster.address}
    flow = bench.build(given)
    flow.wait_for(lambda: "second" in nodes_of(bench, output / "images"))
    ray_cluster.kill_second()
    done = len(list((output / "manifest" / "download").glob("*.json")))
    if flow.process.wait(200) != 0:
        assert "because a worker ended" in flow.log.read_text()
        bench.build(given).end()
    assert done < len(list((output / "manifest" / "download").glob("*.json"))), "killed too late"
    assert digests(output) == expected
    assert nodes_of(bench, output / "latents") == {"head"}


@pytest.mark.long
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL], ids=lambda ending: ending.name)
@pytest.mark.parametrize("engine", ["threads", "processes", "dask", "ray"])
def test_flow_that_ends_leaves_no_process(engine: str, ending: signal.Signals, bench: Bench, tmp_path: Path) -> None:
    if (engine, ending) == ("threads", signal.SIGKILL):
        pytest.skip("children of a killed flow are their own masters; a download ends with its parent")
    flow = bench.stub("SLEEP", tmp_path, 1, engine)
    flow.wait_for(lambda: len(list(tmp_path.glob("pids-*"))) == 2)
    flow.wait_for(lambda: all(path.read_text() for path in tmp_path.glob("pids-*")))
    family = flow.family()
    children = {psutil.Process(int(path.read_text().split()[1])) for path in tmp_path.glob("pids-*")}
    assert children <= family
    flow.process.send_signal(ending)
    # Those of a killed flow are their own masters; a download of ours ends with its parent.
    late = (
        {p for p in family if p in children or p.name().startswith(RAY_AGENTS)} if ending == signal.SIGKILL else set()
    )
    left = wait_for_end(family - late, 30)
    wait_for_end(late, 0)
    assert left == []
    assert len(list(tmp_path.glob("pids-*"))) == 2, "a waiting batch began"


@pytest.fixture
def dask_cluster(bench: Bench) -> Iterator[DaskCluster]:
    cluster = DaskCluster(bench)
    yield cluster
    assert cluster.stop() == []


@pytest.mark.long
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL], ids=lambda ending: ending.name)
def test_batch_on_a_running_dask_cluster_ends_after_its_shard(
    ending: signal.Signals, bench: Bench, tmp_path: Path, dask_cluster: DaskCluster
) -> None:
    flow = bench.stub("WALK", tmp_path, 4, "dask", dask_cluster.address)
    manifest = tmp_path / "manifest" / "walk"
    flow.wait_for(lambda: len(list(manifest.glob("*.json"))) >= 2)
    flow.process.send_signal(ending)
    assert flow.process.wait(20) != 0
    time.sleep(5)
    assert len(list(manifest.glob("*.json"))) < 8
    bench.stub("WALK", tmp_path, 4, "dask", dask_cluster.address).end()
    assert len(list(manifest.glob("*.json"))) == 8
