"""DeepSpeed training across two hosts that share a disk; one is cut off in the middle, the other goes on alone."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from sdtrain.formats.checkpoint import find_checkpoint
from tests.hosts.two_hosts import INTERFACE, Host, hosts, why_not
from tests.sdtrain.launching import BIN, REPOSITORY, finish, log_of, start
from tests.training_fixtures import write_config, write_latents, write_models

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(why_not() is not None, reason=f"needs hosts of its own: {why_not()}"),
]

WATCHED = REPOSITORY / "tests" / "sdtrain" / "watched_train.py"
PORT = 29500  # of hosts that nobody else uses
STALL_TIMEOUT_S = 10
ENDS_WITHIN_S = 40
"""The stall timeout, the watchdog's look at the others (four times 2.5 s), and the launcher's end."""
EVERY = 5


@dataclass(frozen=True)
class World:
    """What is trained, on the disk that the hosts share."""

    folder: Path
    config: Path

    def output(self, name: str) -> Path:
        """A run's directory, under the only folder that a host can lose."""
        return self.folder / "shared" / name

    def watched(self, name: str) -> Path:
        """Where the ranks of a leg write down what goes into the network."""
        folder = self.folder / f"watched-{name}"
        folder.mkdir(exist_ok=True)
        return folder

    def samples(self, name: str, num_ranks: int) -> dict[int, list[str]]:
        """Step -> digests of latent, noise, timestep and tokens of each sample, of the steps that all finished."""
        seen: dict[int, list[str]] = {}
        finished = []
        for rank in range(num_ranks):
            lines = [json.loads(line) for line in (self.watched(name) / f"rank-{rank}.jsonl").read_text().splitlines()]
            finished.append({line["step"] for line in lines if "applied" in line})
            for line in lines:
                if "samples" in line:
                    seen.setdefault(line["step"], []).extend(line["samples"])
        return {step: sorted(seen[step]) for step in set.intersection(*finished)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    (folder / "shared").mkdir()
    models = write_models(folder / "models")
    data = write_latents(folder / "data", models)
    changes = {"steps": 100_000, "checkpoint": {"every": EVERY}, "guard": {"stall_timeout_s": STALL_TIMEOUT_S}}
    return World(folder, write_config(folder / "toy.yaml", models, data, **changes))


@pytest.fixture
def two_hosts() -> Iterator[list[Host]]:
    with hosts("host-a", "host-b") as both:
        yield both


def torchrun(world: World, node: int, first: Host) -> list[str | Path]:
    where = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"]
    return [BIN / "torchrun", *where, "--master-addr", first.address, "--master-port", str(PORT), WATCHED]


def deepspeed(world: World, node: int, first: Host) -> list[str | Path]:
    hostfile = world.folder / "hostfile"
    hostfile.write_text("host-a slots=1\nhost-b slots=1\n")
    where = ["--hostfile", hostfile, "--no_ssh", "--node_rank", str(node)]
    return [BIN / "deepspeed", *where, "--master_addr", first.address, "--master_port", str(PORT), WATCHED]


@pytest.mark.parametrize("launcher", [torchrun, deepspeed])
def test_a_host_that_is_cut_off_is_named_and_the_other_goes_on_with_the_same_samples(
    launcher: Callable[[World, int, Host], list[str | Path]], world: World, two_hosts: list[Host]
) -> None:
    name = launcher.__name__
    output = world.output(name)
    first, second = two_hosts
    ranks = [launch(world, name, host, launcher(world, node, first)) for node, host in enumerate(two_hosts)]
    wait_for_checkpoints(ranks[0], world, output, 2)
    lost = rank_on(second)

    second.pull_cable()
    second.lose_disk(world.folder / "shared")
    cut_at = time.monotonic()
    assert ranks[0].wait(ENDS_WITHIN_S) != 0
    took = time.monotonic() - cut_at
    said = (world.folder / f"{name}-host-a.log").read_text()
    print(f"{name}: ended {took:.1f} s after the cut")
    assert said.count(f"Training made no progress for {STALL_TIMEOUT_S} s") == 1
    assert f"Behind: rank 1 on host-b (process {lost})" in said
    assert "its machine is gone" in said
    assert first.processes() == []
    assert not (output / "DONE").exists()

    reached = find_checkpoint(output).layout.step
    assert reached >= 2 * EVERY
    last = reached + 2 * EVERY
    go_on = start(
        [sys.executable, WATCHED], world.config, output, "--steps", str(last), WATCH_TO=str(world.watched(f"{name}-on"))
    )
    code, text = finish(go_on)
    assert code == 0, text
    assert f"from step {reached} " in text

    plan = plan_of_one_process(world, name, last)
    before, after = world.samples(name, 2), world.samples(f"{name}-on", 1)
    assert after == {step: plan[step] for step in range(reached, last)}
    assert set(before) >= set(range(reached))
    assert {step: plan[step] for step in before if step < last} == {s: d for s, d in before.items() if s < last}
    assert len(log_of(output)) == last


def launch(world: World, name: str, host: Host, command: list[str | Path]) -> object:
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "WATCH_TO": str(world.watched(name)),
    }
    arguments = ["--config", world.config, "--output", world.output(name)]
    return host.start([*command, *arguments], world.folder / f"{name}-{host.name}.log", environment)


def wait_for_checkpoints(process, world: World, output: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list((output / "checkpoints").glob("step-*"))) < count:
        said = "".join(path.read_text() for path in world.folder.glob("*.log"))
        assert process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.05)


def rank_on(host: Host) -> int:
    """The process of the only rank there, by its number on that host."""
    ranks = [p for p in host.processes() if str(WATCHED) in p.cmdline() and "RANK" in p.environ()]
    assert len(ranks) == 1, ranks
    return number_inside(ranks[0])


def number_inside(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1])


def plan_of_one_process(world: World, name: str, steps: int) -> dict[int, list[str]]:
    """What a run of one process from nothing feeds the network, step by step."""
    content = yaml.safe_load(world.config.read_text())
    config = world.folder / "alone.yaml"
    config.write_text(yaml.safe_dump(content))
    output, watched = world.output(f"{name}-alone"), world.watched(f"{name}-alone")
    code, text = finish(start([sys.executable, WATCHED], config, output, "--steps", str(steps), WATCH_TO=str(watched)))
    assert code == 0, text
    return world.samples(f"{name}-alone", 1)
