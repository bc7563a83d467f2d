"""An evaluation searches a dataset on S3 from a machine that has nothing of it: only tables come."""

import shutil
from types import SimpleNamespace

import pyarrow.parquet as pq

from filters.contamination import training_data
from filters.contamination.stage import training_stage
from sdtrain.dataset.lock import lock_to_change
from sdtrain.dataset.manifest import entries, write_entry
from sdtrain.dataset.open import dataset_at
from sdtrain.dataset.sync import push_files
from sdtrain.dataset.terminal_progress import run_with_bar
from sdtrain.evaluation.layout import EvaluationDir, write_json
from sdtrain.evaluation.prompts import digest_of
from sdtrain.settings import dump_settings
from tests.filters.dataset_fixtures import make_dataset
from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET


def test_prompts_are_found_from_an_empty_machine(store, tmp_path, monkeypatch):
    local, recipe = make_dataset(tmp_path)
    url = f"s3://{BUCKET}/{tmp_path.name}"
    written = dataset_at(url, tmp_path / "writer")
    with lock_to_change(written, "sdtrain build"):
        shutil.copytree(local.root, written.root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest"))
        written.recipe.write_text(dump_settings(recipe))
        push_files(written, written.recipe)
        for stage in ("select", "download", "score", "dedup", "decide", "encode"):
            for entry in entries(local, stage):
                write_entry(written, entry)
    monkeypatch.setattr("sdtrain.dataset.open.work_folder", lambda url, parent=None: tmp_path / "empty")

    kept, dropped = (captions_of(local, is_kept)[0] for is_kept in (True, False))
    prompts = ["no such caption", f"{kept.upper()}.", dropped]
    directory = EvaluationDir(tmp_path / "evaluation")
    write_json(directory.prompts, prompts)
    sweep = SimpleNamespace(
        reference=SimpleNamespace(places=()),
        prompts=SimpleNamespace(digest=digest_of(prompts)),
        directory=directory,
        following=None,
    )
    training = training_data._opened(url, sweep)
    run_with_bar(training_stage(training.job), directory, training.job)
    assert [hit.item for hit in training_data.hits_of(training.job, directory)] == [1]
    assert not list((tmp_path / "empty").glob("*/*.tar"))


def captions_of(dataset, is_kept):
    """Of samples that were kept, or of those that were not."""
    reasons = {row["uid"]: row["reason"] for row in pq.read_table(dataset.decisions).to_pylist()}
    rows = [row for path in sorted(dataset.root.glob("images/*.parquet")) for row in pq.read_table(path).to_pylist()]
    return [row["caption"] for row in rows if (reasons[row["uid"]] is None) == is_kept]
