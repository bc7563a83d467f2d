"""A real SLURM of one node, in a folder, from the daemons of Debian's packages slurm-wlm and munge."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
_START_S = 30.0

# cred_expire also is the time that a requeued job waits. Without cgroups and without accounting, which one node can do.
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=30
SchedulerParameters=sched_interval=2,batch_sched_delay=1
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES OverTimeLimit=0 State=UP
"""


def why_not() -> str | None:
    """Why there can be no SLURM here, for `pytest.skip`; None if there can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    return f"not installed: {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)" if missing else None


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """A running SLURM; gives the environment that its commands need."""
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    for name in ("state", "spool"):
        (folder / name).mkdir()
    host = socket.gethostname()
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, ports=_ports(), cpus=os.cpu_count()))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    own = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "seed-file": "munge.seed"}
    munge = [f"--{name}={folder / file}" for name, file in own.items()]
    daemons = [
        ["munged", "--foreground", "--force", f"--log-file={folder / 'munged.log'}", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    ]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for daemon in daemons:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            started.append(subprocess.Popen(daemon, env=os.environ | environment, **quiet))
            if daemon[0] == "munged":
                _wait_until((folder / "munge.socket").exists, folder)
        _wait_until(lambda: "idle" in _said(environment, "sinfo", "--noheader", "--format", "%T"), folder)
        yield environment
    finally:
        _said(environment, "scancel", "--me", "--full", "--signal=KILL")
        _wait_quietly(lambda: not _said(environment, "squeue", "--noheader"), 20)
        for process in reversed(started):
            process.terminate()
            process.wait(_START_S)
        _kill_what_is_left(environment["SLURM_CONF"])


def _kill_what_is_left(conf: str) -> None:
    """Steps that do not end are their own masters."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get("SLURM_CONF") == conf and process.pid != os.getpid():
                process.kill()


def _wait_until(holds, folder: Path) -> None:
    if not _wait_quietly(holds, _START_S):
        logs = "".join(f"{path}:\n{path.read_text()[-3000:]}" for path in folder.glob("*.log"))
        raise AssertionError(f"SLURM did not come up\n{logs}")


def _wait_quietly(holds, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.2)
    return False


def _said(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def _ports() -> list[int]:
    probes = [socket.socket() for _ in range(2)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
