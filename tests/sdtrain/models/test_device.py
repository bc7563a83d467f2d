import subprocess
import sys

from sdtrain.models.device import claim, claim_device

HOLD = """
import sys
from pathlib import Path
from sdtrain.models.device import claim

print(claim(sys.argv[2:], Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


class Holder:
    """A process that holds a GPU until its input ends or it is killed."""

    def __init__(self, folder, gpus):
        command = [sys.executable, "-c", HOLD, str(folder), *gpus]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.position = int(self.process.stdout.readline())

    def end(self, kill=False):
        self.process.kill() if kill else self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()
        if kill:
            self.process.stdin.close()


def test_processes_share_the_gpus_evenly_and_a_killed_one_gives_its_own_back(tmp_path):
    gpus = ["GPU-a", "GPU-b", "GPU-c"]
    holders = [Holder(tmp_path, gpus) for _ in range(5)]
    try:
        assert [holder.position for holder in holders] == [0, 1, 2, 0, 1]
        holders.pop(1).end(kill=True)
        holders.append(Holder(tmp_path, gpus))
        assert holders[-1].position == 1
    finally:
        for holder in holders:
            holder.end()


def test_the_same_gpu_is_known_by_its_name_whatever_else_a_process_sees(tmp_path):
    holder = Holder(tmp_path, ["GPU-a", "GPU-b"])
    try:
        assert claim(["GPU-b", "GPU-a"], tmp_path) == 0
        assert claim(["GPU-a"], tmp_path) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["GPU-a.0.lock", "GPU-a.1.lock", "GPU-b.0.lock"]
    finally:
        holder.end()


def test_a_process_keeps_its_device():
    assert claim_device() is claim_device()
