"""The data stages on Ray across two hosts, one of which loses its power in the middle: the bytes of one machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sdtrain.demo.server import serve_world
from sdtrain.demo.train_vae import build_vae
from sdtrain.demo.world import World, make_world, open_world
from tests.flows.server_fixtures import Running, answers, free_port, little_recipe
from tests.flows.support.engine_fixtures import Bench, make_bench
from tests.hosts.two_hosts import Host, address_of, hosts, why_not

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_not() is not None, reason=f"needs hosts of its own: {why_not()}"),
]

RAY = Path(sys.executable).with_name("ray")
PORT = 6379  # of hosts that nobody else uses
SMALL = ["--num-cpus=1", f"--object-store-memory={100 * 2**20}", "--disable-usage-stats", "--block"]
BUILD = "import sys, json; from flows.build_dataset import build_dataset; build_dataset(**json.loads(sys.argv[1]))"


class Site:
    """Two hosts that reach one Prefect server, and the same little web on the loopback of each."""

    def __init__(self, bench: Bench, both: list[Host], worlds: list[World]):
        self.bench, self.hosts, self._worlds = bench, both, worlds

    def start(self, number: int, log: str, *command: str | Path) -> subprocess.Popen[bytes]:
        host, world = self.hosts[number], self._worlds[number]
        environment = self.bench.environment | {"NODE": host.name, "SSL_CERT_FILE": str(world.ca)}
        return host.start(command, self.bench.folder / f"{log}.log", environment)

    def serve(self) -> None:
        for number, world in enumerate(self._worlds):
            self.start(number, f"web-{number}", sys.executable, "-m", "sdtrain.demo.server", world.directory)
        wait_until(lambda: all(world.ca.exists() for world in self._worlds), lambda: "no web")

    def start_ray(self, temporary: str) -> str:
        first, second = self.hosts
        head = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={temporary}"]
        self.start(0, "ray-0", RAY, "start", *head, f"--node-ip-address={first.address}", *SMALL)
        address = f"{first.address}:{PORT}"
        wait_until(lambda: "Ray runtime started" in self.said("ray-0"), lambda: self.said("ray-0"))
        self.start(1, "ray-1", RAY, "start", f"--address={address}", f"--node-ip-address={second.address}", *SMALL)
        wait_until(lambda: "Ray runtime started" in self.said("ray-1"), lambda: self.said("ray-1"))
        return address

    def said(self, log: str) -> str:
        path = self.bench.folder / f"{log}.log"
        return path.read_text() if path.exists() else ""


def wait_until(holds: Callable[[], bool], why: Callable[[], str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, why()
        time.sleep(0.05)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Of flows that find their server at this machine's address on the hosts' network."""
    with tempfile.TemporaryDirectory(prefix="ray-") as short:
        url = f"http://{address_of(1)}:{free_port()}/api"
        made = make_bench(tmp_path, url, short)
        made.environment["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
        yield made


@pytest.fixture
def parameters(bench: Bench) -> dict[str, object]:
    world = make_world(bench.folder / "world", num_rows=60, http_port=0, https_port=0)
    build_vae().save_pretrained(bench.folder / "vae")
    recipe = bench.folder / "little.yaml"
    recipe.write_text(little_recipe(bench.folder / "vae", samples_per_shard=6))
    return {"recipe": str(recipe), "metadata": str(world.metadata), "workers": 2}


@pytest.fixture
def site(bench: Bench, parameters: dict[str, object]) -> Iterator[Site]:
    copies = [shutil.copytree(bench.folder / "world", bench.folder / f"world-{number}") for number in range(2)]
    own = [Path(bench.environment["RAY_TMPDIR"])]
    port = bench.environment["PREFECT_API_URL"].split(":")[2].split("/")[0]
    with hosts("host-a", "host-b", own_folders=own) as both:
        log = bench.folder / "server.log"
        with Running(["server", "start", "--host", address_of(1), "--port", port], bench.environment, log):
            health = f"{bench.environment['PREFECT_API_URL']}/health"
            wait_until(lambda: answers(health), log.read_text)
            found = Site(bench, both, [open_world(copy) for copy in copies])
            found.serve()
            yield found


def digests(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.suffix in (".tar", ".parquet")]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def test_a_host_that_loses_its_power_costs_no_byte(bench: Bench, parameters: dict[str, object], site: Site) -> None:
    with serve_world(open_world(bench.folder / "world")) as served:
        bench.environment["SSL_CERT_FILE"] = str(served.world.ca)
        bench.build(parameters | {"output": str(bench.folder / "alone")}).end()
    expected = digests(bench.folder / "alone")
    assert any(name.startswith("latents/") for name in expected)

    output = bench.folder / "across"
    address = site.start_ray(bench.environment["RAY_TMPDIR"])
    given = json.dumps(parameters | {"output": str(output), "engine": "ray", "engine_address": address})
    flow = site.start(0, "flow", sys.executable, "-c", BUILD, given)

    def who_wrote(folder: str) -> set[str]:
        assert flow.poll() is None or flow.returncode == 0, site.said("flow")
        return {node for node, path in bench.published() if output / folder == path.parent}

    wait_until(lambda: who_wrote("images") == {"host-a", "host-b"}, lambda: site.said("flow"), 240)
    begun = time.monotonic()
    site.hosts[1].power_off()
    done = len(list((output / "manifest" / "download").glob("*.json")))
    if flow.wait(400) != 0:
        assert "because a worker ended" in site.said("flow")
        again = site.start(0, "flow", sys.executable, "-c", BUILD, given)
        assert again.wait(400) == 0, site.said("flow")
    print(f"{time.monotonic() - begun:.0f} s after the loss; {done} shards were downloaded before it")
    assert done < len(list((output / "manifest" / "download").glob("*.json"))), "killed too late"
    assert digests(output) == expected
    assert who_wrote("latents") == {"host-a"}
