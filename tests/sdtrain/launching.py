"""Training in processes of their own, as users start it."""

import csv
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
SCRIPT = "sdtrain/train.py"
BIN = Path(sys.executable).parent


def deepspeed(num_ranks, script=SCRIPT):
    return [BIN / "deepspeed", "--num_gpus", str(num_ranks), "--master_port", str(free_port()), script]


def torchrun(num_ranks, script=SCRIPT):
    return [BIN / "torchrun", "--nproc-per-node", str(num_ranks), "--master-port", str(free_port()), script]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(launcher, config, output, *arguments, **environment):
    """Starts training in its own process group."""
    return launch([*launcher, "--config", config, "--output", output, *arguments], **environment)


def launch(command, **environment):
    """Starts any command in its own process group."""
    ours = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    options = {"cwd": REPOSITORY, "env": os.environ | ours | environment, "start_new_session": True}
    return subprocess.Popen([*map(str, command)], **options, **pipes)


def finish(process):
    """Exit code and output; no process of the group, nor a child in a session of its own, stays."""
    children = psutil.Process(process.pid).children(recursive=True)
    try:
        output, _ = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        children += psutil.Process(process.pid).children(recursive=True)
        raise
    finally:
        for member in [*children, *group_of(process)]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    return process.returncode, output


def group_of(process):
    members = []
    for candidate in psutil.process_iter():
        try:
            if os.getpgid(candidate.pid) == process.pid:
                members.append(candidate)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members


def wait_for_step(process, output, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (output / "checkpoints" / f"step-{step:08d}").exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate(timeout=60)[0]}")


def log_of(output, column="loss"):
    with (output / "log.csv").open() as file:
        return [row[column] for row in csv.DictReader(file)]
