"""A build whose metadata and output lie on S3: killed, and finished on another, empty machine."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from filters.recipe import RECIPES_DIR
from sdtrain.cli import app
from sdtrain.demo.server import serve_world
from sdtrain.demo.world import make_world
from tests.chat_server import MODEL, Asked, Reply, chat_server, completion
from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET, KEY_ID, SECRET

LEAN = ["--no-keep-local"]
KEPT = re.compile(r"(selection|images|scores|captions|answers|dataset|latents)/|(duplicates|decisions)\.parquet")


@pytest.fixture(scope="module")
def recipe(server, tmp_path_factory) -> Path:
    world = make_world(tmp_path_factory.mktemp("world"), num_rows=60, http_port=0, https_port=0)
    for path in Path(world.metadata).rglob("*.parquet") if Path(world.metadata).is_dir() else [Path(world.metadata)]:
        rows = pq.read_table(path)
        pq.write_table(rows.append_column("num_faces", [[row % 3 for row in range(len(rows))]]), path)
        server.put(path, f"metadata/{path.name}")
    content = yaml.safe_load((RECIPES_DIR / "demo.yaml").read_text())
    content["select"] |= {"metadata": f"s3://{BUCKET}/metadata/", "samples_per_shard": 15, "carry": ["num_faces"]}
    content["pack"]["samples_per_shard"] = 12
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    with serve_world(world), chat_server(said) as answering:
        endpoint = {"url": answering.url, "model": MODEL}
        content["caption"] = {"endpoint": endpoint, "prompts": {"short": "Describe it."}, "image_px": 64}
        content["decide"]["rules"]["ask"] = [{"question": "Is it red?", "max": 1}]
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        yield path


def said(asked: Asked) -> Reply:
    """The same about the same image."""
    return completion(f"No {hashlib.sha256(asked.images[0]).hexdigest()[:8]}")


def start(server, arguments: list[str], work: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "sdtrain.cli", *arguments]
    environment = os.environ | server.environment
    environment |= {"SDTRAIN_WORK_DIR": str(work), "SDTRAIN_LOCK_EXPIRY_S": "3", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def run(server, arguments: list[str], work: Path, log: Path) -> None:
    process = start(server, arguments, work, log)
    assert process.wait(timeout=200) == 0, log.read_text()


def digests(objects: dict[str, bytes]) -> dict[str, str]:
    return {
        name: hashlib.sha256(content).hexdigest()
        for name, content in objects.items()
        if KEPT.match(name) and not name.endswith("_stats.json")
    }


def outputs(objects: dict[str, bytes]) -> dict[str, str]:
    """What the manifest says of each output."""
    entries = [json.loads(content) for name, content in objects.items() if re.fullmatch(r"manifest/\w+/\d+.json", name)]
    return {name: output["sha256"] for entry in entries for name, output in entry["outputs"].items()}


def kill_after(server, process: subprocess.Popen, prefix: str, stage: str, delay_s: float) -> None:
    """Kills a build's whole tree a while after its first entry of a stage is on S3."""
    deadline = time.monotonic() + 120
    begin = f"{prefix}/manifest/{stage}/"
    while process.poll() is None and time.monotonic() < deadline:
        if server.client.list_objects_v2(Bucket=BUCKET, Prefix=begin).get("KeyCount"):
            break
        time.sleep(0.02)
    time.sleep(delay_s)
    assert process.poll() is None, "the build ended before it was killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.first
@pytest.mark.timeout(600)
def test_a_build_killed_on_one_machine_is_finished_on_an_empty_one_with_identical_objects(
    server, store, recipe, tmp_path
):
    log, rng = tmp_path / "log", random.Random(3)
    run(server, ["build", str(recipe), "--output", f"s3://{BUCKET}/whole"], tmp_path / "a", log)
    whole = server.objects("whole")

    arguments = ["build", str(recipe), "--output", f"s3://{BUCKET}/killed"]
    for number, stage in enumerate(("caption", "ask", "pack")):
        process = start(server, [*arguments, *(LEAN if number else [])], tmp_path / f"machine-{number}", log)
        kill_after(server, process, "killed", stage, rng.uniform(0, 0.2))
        time.sleep(3.5)  # until the lock of the killed one has expired
    run(server, [*arguments, *LEAN], tmp_path / "machine-last", log)
    killed = server.objects("killed")
    assert list((tmp_path / "a").rglob("*.tar"))
    assert not list((tmp_path / "machine-last").rglob("*.tar"))

    assert digests(killed) == digests(whole)
    assert digests(whole).keys() >= {
        "latents/00000.tar",
        "captions/00000.parquet",
        "answers/00000.parquet",
        "decisions.parquet",
        "selection/00000.parquet",
    }
    for objects in (whole, killed):
        assert outputs(objects) == {name: digests(objects)[name] for name in outputs(objects)}
        assert objects.keys() >= {"recipe.yaml", "report.html", "dataset/index.json", "latents/info.json"}
        assert "dataset.lock" not in objects
    hidden = [KEY_ID.encode(), SECRET.encode()]
    seen = [log.read_bytes(), *whole.values(), *killed.values()]
    seen += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not [secret for secret in hidden for content in seen if secret in content]

    uids = tmp_path / "uids.txt"
    uid = pq.read_table(io.BytesIO(killed["latents/00000.parquet"]))["uid"][0].as_py()
    uids.write_text(uid + "\n")
    target = f"s3://{BUCKET}/killed"
    run(server, ["decide", target, "--min-side", "1", "--dry-run"], tmp_path / "curator", log)
    run(server, ["remove", target, "--list", str(uids), "--by", "uid"], tmp_path / "curator", log)
    left = server.objects("killed")
    assert not [name for name, content in left.items() if name.endswith(".tar") and uid.encode() in content]
    assert outputs(left) == {name: digests(left)[name] for name in outputs(left)}
    assert "removal.json" not in left
    before = digests(left)
    run(server, arguments, tmp_path / "afterwards", log)
    assert digests(server.objects("killed")) == before
    check_questions(target, tmp_path)


def check_questions(target: str, folder: Path) -> None:
    """A machine that has nothing of a dataset can ask it anything."""

    def asked(*arguments: str) -> str:
        done = CliRunner().invoke(app, [arguments[0], target, *arguments[1:]], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    status = asked("status")
    assert "No command uses it." in status
    num_packed = int(asked("query", "SELECT count(*) FROM packed", "--format", "csv").split()[-1])
    assert re.search(rf"(?m)^ *pack\b.*\b{num_packed}\b", status)
    assert "http_404" in asked("funnel")
    words = [json.loads(line) for line in asked("search", "red", "--words", "--json", "--top", "3").splitlines()]
    assert [word["similarity"] for word in words] == [1.0] * 3
    asked("report")
    (work,) = (folder / "work").iterdir()
    assert list(work.glob("pictures/*.jpg")), "thumbnails of images that were never brought here whole"
    assert not list(work.rglob("*.tar"))
