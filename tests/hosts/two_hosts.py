"""Hosts of their own on one machine: kernel namespaces for network, host name, processes and mounts, on one bridge.

Each host has an address and a loopback that the others do not reach, a `/dev/shm` of its own, and sees the files of
the machine, as hosts with shared storage do. It can lose its power (every process is killed at once), its cable (no
packet passes, and no connection is told) and its shared disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERFACE = "eth0"
_START_S = 10.0


def why_not() -> str | None:
    """Why there can be no hosts here, for `pytest.skip`; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "unshare", "nsenter", "mount") if not shutil.which(name)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: apt-get install iproute2 util-linux)"
    tried = subprocess.run(["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "true"], capture_output=True)
    return None if tried.returncode == 0 else f"no namespaces on this machine: {tried.stderr.decode().strip()}"


@dataclass(frozen=True)
class Host:
    """One of the hosts.

    Attributes:
        name: its host name.
        address: its address, known to the machine and to the other hosts.
        cable: the machine's end of its network cable.
        init: its first process; when that ends, the kernel kills all others of the host.
    """

    name: str
    address: str
    cable: str
    init: psutil.Process

    def start(
        self, command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a program on this host, in this process's folder; its output is appended to `log`."""
        with log.open("a") as output:
            return subprocess.Popen(self.command(command), env=environment, stdout=output, stderr=subprocess.STDOUT)

    def command(self, command: Sequence[str | Path]) -> list[str]:
        """`command`, to be run on the machine, as it runs on this host."""
        enter = ["nsenter", "--target", str(self.init.pid), "--net", "--uts", "--mount", "--pid"]
        return [*enter, f"--wd={Path.cwd()}", "--", *map(str, command)]

    def pull_cable(self) -> None:
        """No packet reaches or leaves the host; nobody is told."""
        _run("ip", "link", "set", self.cable, "down")

    def lose_disk(self, folder: Path) -> None:
        """The host sees an empty folder instead of the shared one; files that are open stay open."""
        _run(*self.command(["mount", "-t", "tmpfs", "tmpfs", folder]))

    def power_off(self) -> None:
        """Every process of the host is killed at once."""
        if self.init.is_running():
            self.init.kill()

    def processes(self) -> list[psutil.Process]:
        """All that runs on the host, but for its first process."""
        space = _pid_space(self.init.pid)
        return [p for p in psutil.process_iter() if p != self.init and _pid_space(p.pid) == space]


@contextmanager
def hosts(*names: str, own_folders: Sequence[Path] = ()) -> Iterator[list[Host]]:
    """Hosts of these names and, at the first address of their network, this machine; all end with the block.

    Args:
        names: host names.
        own_folders: existing folders of which each host has one of its own, empty at first.
    """
    mark = os.getpid()
    bridge = f"sd{mark}"
    made: list[Host] = []
    _run("ip", "link", "add", bridge, "type", "bridge")
    try:
        _run("ip", "address", "add", f"{address_of(1)}/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for number, name in enumerate(names):
            made.append(_make(name, f"sd{mark}n{number}", address_of(number + 2), bridge, own_folders))
        yield made
    finally:
        for host in made:
            host.power_off()
            host.init.wait(_START_S)
            subprocess.run(["ip", "link", "delete", host.cable], capture_output=True)  # the kernel would, but later
        subprocess.run(["ip", "link", "delete", bridge], check=False)


def address_of(number: int) -> str:
    """The n-th address of the network that this process's hosts have; the first is the machine's own."""
    mark = os.getpid()
    return f"10.{200 + mark % 50}.{mark // 50 % 250}.{number}"


def _make(name: str, cable: str, address: str, bridge: str, own_folders: Sequence[Path]) -> Host:
    spaces = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    own = " ".join(f"&& mount -t tmpfs tmpfs '{folder}'" for folder in ("/dev/shm", *own_folders))
    script = f"hostname {name} {own} && touch /dev/shm/ready && exec sleep infinity"
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # killed, unshare says so
    outer = psutil.Popen(["unshare", *spaces, "sh", "-c", script], **quiet)
    init = _first_child(outer)
    _run("ip", "link", "add", cable, "type", "veth", "peer", "name", INTERFACE, "netns", str(init.pid))
    _run("ip", "link", "set", cable, "master", bridge, "up")
    host = Host(name, address, cable, init)
    _run(*host.command(["ip", "address", "add", f"{address}/24", "dev", INTERFACE]))
    for interface in ("lo", INTERFACE):
        _run(*host.command(["ip", "link", "set", interface, "up"]))
    return host


def _first_child(outer: psutil.Popen) -> psutil.Process:
    """The first process of a host, once the host is as it should be."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and outer.poll() is None:
        for child in outer.children():
            if Path(f"/proc/{child.pid}/root/dev/shm/ready").exists() and child.name() == "sleep":
                return child
        time.sleep(0.02)
    raise AssertionError(f"no host came up (exit code {outer.poll()})")


def _pid_space(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return None


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
