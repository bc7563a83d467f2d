"""A removal killed between its files and their entries: brought to its end by the next build, wherever that runs."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET
from tests.sdtrain.dataset.s3.test_build_on_s3 import LEAN, digests, outputs, recipe, run  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

KILLED = """
import os, signal, sys
from filters.remove.rewrite import StageRewrite
from sdtrain.cli import main

stage, recount = sys.argv.pop(1), StageRewrite._recount

def kill(self, made, table, entry, tables):
    if entry.stage == stage:
        os.kill(os.getpid(), signal.SIGKILL)
    return recount(self, made, table, entry, tables)

StageRewrite._recount = kill
main()
"""


@pytest.fixture(scope="module")
def built(server, recipe, tmp_path_factory):  # noqa: F811
    """(Names and contents of a built dataset's objects, a uid of it)."""
    folder = tmp_path_factory.mktemp("built")
    run(server, ["build", str(recipe), "--output", f"s3://{BUCKET}/built"], folder, folder / "log")
    objects = server.objects("built")
    return objects, pq.read_table(io.BytesIO(objects["latents/00000.parquet"]))["uid"][0].as_py()


@pytest.mark.parametrize("machine", ["same", "empty"])
@pytest.mark.parametrize("stage", ["download", "score", "pack", "encode"])
def test_an_interrupted_removal_leaves_nothing_of_a_sample(server, recipe, built, tmp_path, stage, machine):  # noqa: F811
    (objects, uid), log, prefix = built, tmp_path / "log", f"removal-{stage}-{machine}"
    for name in objects:
        source = {"Bucket": BUCKET, "Key": f"built/{name}"}
        server.client.copy_object(CopySource=source, Bucket=BUCKET, Key=f"{prefix}/{name}")
    (tmp_path / "uids.txt").write_text(uid + "\n")
    target, first, then = f"s3://{BUCKET}/{prefix}", tmp_path / "first", tmp_path / "then"
    remove = ["remove", target, "--list", str(tmp_path / "uids.txt"), "--by", "uid"]
    environment = os.environ | server.environment
    environment |= {"SDTRAIN_WORK_DIR": str(first), "SDTRAIN_LOCK_EXPIRY_S": "3", "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, stage, *remove], env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    time.sleep(3.5)  # until its lock has expired

    where = first if machine == "same" else then
    run(server, ["build", str(recipe), "--output", target, *LEAN], where, log)
    assert "A removal had been interrupted" in log.read_text()
    left = server.objects(prefix)
    assert not [name for name, content in left.items() if name.endswith(".tar") and uid.encode() in content]
    assert {name: digests(left)[name] for name in outputs(left)} == outputs(left)
    assert "removal.json" not in left
    assert not list(where.rglob("*.tar"))
    packed = pq.read_table(io.BytesIO(left["dataset/00000.parquet"]))
    tar = left["dataset/00000.tar"]
    for row in packed.to_pylist():
        begin = row["picture_offset"] - 512
        assert tar[begin : begin + 512].startswith(f"{row['key']}.{row['extension']}".encode())
