"""What a user gets wrong is answered by one sentence that says what to do, and exit code 2."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdtrain import cli

COLUMNS = {
    "URL": ["http://example.com/a.jpg"],
    "TEXT": ["a"],
    "WIDTH": pa.array([600], pa.int32()),
    "HEIGHT": pa.array([600], pa.int32()),
    "pwatermark": pa.array([0.1], pa.float32()),
    "punsafe": pa.array([0.1], pa.float32()),
    "AESTHETIC_SCORE": pa.array([6.0], pa.float32()),
}


@pytest.fixture
def sentence(monkeypatch, capsys):
    """Runs `sdtrain ARGUMENTS` and returns its one sentence."""

    def run(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["sdtrain", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        error = capsys.readouterr().err
        assert stopped.value.code == 2, error
        assert error.startswith("error: "), error
        assert "Traceback" not in error
        return error

    return run


def write_metadata(path: Path, without: str | None = None, rows: int = 1) -> Path:
    table = pa.table({name: values for name, values in COLUMNS.items() if name != without})
    pq.write_table(table.slice(0, rows), path)
    return path


def write_many_rows(path: Path, rows: int = 20_000) -> Path:
    """Rows that take more than a megabyte of selection."""
    urls = [f"http://example.com/{i:032x}.jpg" for i in range(rows)]
    repeated = {name: pa.array(v.to_pylist() * rows, v.type) for name, v in COLUMNS.items() if isinstance(v, pa.Array)}
    pq.write_table(pa.table({"URL": urls, "TEXT": urls} | repeated), path)
    return path


def test_a_missing_column_is_named_with_its_file(sentence, tmp_path):
    metadata = write_metadata(tmp_path / "m.parquet", without="pwatermark")
    said = sentence("build", "laion-aesthetics", "--metadata", metadata, "--output", tmp_path / "data")
    assert "m.parquet" in said
    assert "PWATERMARK" in said


def test_an_empty_parquet_is_said_to_be_empty(sentence, tmp_path):
    metadata = write_metadata(tmp_path / "m.parquet", rows=0)
    said = sentence("build", "laion-aesthetics", "--metadata", metadata, "--output", tmp_path / "data")
    assert "m.parquet" in said


def test_a_file_that_is_not_parquet_is_named(sentence, tmp_path):
    (tmp_path / "m.parquet").write_text("URL,TEXT\n")
    said = sentence("build", "laion-aesthetics", "--metadata", tmp_path / "m.parquet", "--output", tmp_path / "data")
    assert "m.parquet" in said
    assert "Parquet" in said


def test_an_unknown_recipe_gets_the_nearest_name(sentence, tmp_path):
    said = sentence("build", "laion-asthetics", "--metadata", "x", "--output", tmp_path)
    assert "Did you mean 'laion-aesthetics'?" in said


def test_an_unknown_key_gets_the_nearest_key(sentence, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nselect:\n  metadta: x\n")
    said = sentence("build", recipe, "--output", tmp_path / "data")
    assert "mine.yaml" in said
    assert "Did you mean 'metadata'?" in said


def test_a_full_disk_stops_with_a_sentence_and_leaves_no_half_file(tmp_path):
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("a full disk is made with `unshare -m` and tmpfs, which needs root on Linux")
    metadata, full = write_many_rows(tmp_path / "m.parquet"), tmp_path / "full"
    full.mkdir()
    recipe = tmp_path / "mine.yaml"
    scores = ", ".join(f"{name}_weights: null" for name in ("clip", "aesthetic", "safety", "watermark"))
    recipe.write_text(f"name: mine\nscore: {{{scores}}}\nencode: {{vae: demo, resolution: 64}}\n")
    build = f"{sys.executable} -m sdtrain.cli build {recipe} --metadata {metadata} --output {full}/data"
    script = f"mount -t tmpfs -o size=600k tmpfs {full}; {build}; code=$?; find {full} -name '*.parquet'; exit $code"
    ended = subprocess.run(["unshare", "-m", "sh", "-c", script], check=False, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "The disk is full" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == "", "no selection file was left"


def test_latents_of_another_vae_are_refused_by_training(tmp_path):
    from sdtrain.errors import UserError
    from sdtrain.loading.latent_store import check_cache

    with pytest.raises(UserError, match=r"vae_sha256 is 'aa' there and 'bb' here.*Encode them again"):
        check_cache({"vae_sha256": "aa"}, {"vae_sha256": "bb"}, tmp_path)
