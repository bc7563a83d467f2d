"""What leaves the work folder of a dataset on S3, and what stays because it may be all that there is."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters.score.stage import SCORE
from sdtrain.dataset.files import FINGERPRINT
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.lock import lock_to_change
from sdtrain.dataset.manifest import describe_outputs, entries, forget_entry, is_whole, write_entry
from sdtrain.dataset.open import dataset_at
from sdtrain.dataset.s3.mirror import Mirror, mirror_of
from sdtrain.dataset.s3.url import parse_url
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import run_batch
from sdtrain.dataset.sync import fetch_shard_file, fetch_tables, keep_local, read_part
from sdtrain.errors import UserError
from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET


@pytest.fixture
def dataset(store, tmp_path):
    made = dataset_at(f"s3://{BUCKET}/{tmp_path.name}", tmp_path / "work")
    with lock_to_change(made, "sdtrain build"):
        yield made


def write(dataset, stage, shard, paths):
    """A finished shard."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{path.name} of {stage}".encode())
    outputs = describe_outputs(dataset, paths)
    return ShardReport(stage=stage, shard=shard, num_in=1, num_out=1, outputs=outputs)


def download(dataset, shard):
    report = write(dataset, "download", shard, [dataset.images_tar(shard), dataset.images_table(shard)])
    write_entry(dataset, report)


def test_tars_leave_and_tables_stay_until_they_are_to_stay_too(dataset):
    download(dataset, 0)
    keep_local(dataset, kept=True)
    assert dataset.images_tar(0).exists()
    keep_local(dataset, kept=False)
    assert not dataset.images_tar(0).exists()
    assert dataset.images_table(0).exists()
    assert read_part(dataset, dataset.images_tar(0), 6, 3) == b"tar"
    fetch_shard_file(dataset.root, dataset.images_tar(0), "download")
    assert dataset.images_tar(0).read_bytes() == b"00000.tar of download"


def test_what_a_shard_was_made_from_leaves_with_it(dataset):
    for shard in (0, 1):
        download(dataset, shard)

    def score(dataset, recipe, shards):
        for shard in shards:
            assert dataset.images_tar(shard).exists()
            yield write(dataset, "score", shard, [dataset.scores(shard)])

    (dataset.root / ".s3-evict").touch()  # as the build says before its first stage
    run_batch(replace(SCORE, shards=lambda *_: [0, 1], fingerprint=lambda *_: "one", run=score), dataset, None, [0])
    assert [dataset.images_tar(shard).exists() for shard in (0, 1)] == [False, True]
    assert dataset.scores(0).exists()


def test_the_only_copy_stays(dataset, store):
    download(dataset, 0)
    download(dataset, 1)
    store.client.delete_object(Bucket=BUCKET, Key=f"{parse_url(dataset.url).prefix}/images/00000.tar")
    dataset.images_tar(1).write_bytes(b"newer than its entry")
    keep_local(dataset, kept=False)
    assert dataset.images_tar(0).exists()
    store.client.put_object(Bucket=BUCKET, Key=f"{parse_url(dataset.url).prefix}/images/00000.tar", Body=b"of others")
    keep_local(dataset, kept=False)
    assert dataset.images_tar(0).exists()


def test_nothing_leaves_during_a_removal(dataset):
    download(dataset, 0)
    dataset.removal.write_text("{}")
    keep_local(dataset, kept=False)
    assert dataset.images_tar(0).exists()


def test_a_dataset_on_disk_alone_has_nowhere_to_let_files_go(tmp_path):
    keep_local(DatasetDir(tmp_path), kept=True)
    with pytest.raises(UserError, match=r"Only files of a dataset on s3:// .* Leave out --no-keep-local"):
        keep_local(DatasetDir(tmp_path), kept=False)


def test_of_shards_that_another_machine_took_back_those_stay_that_say_what_they_are(dataset, store):
    schema = pa.schema([("uid", pa.string())])
    for path, metadata in ((dataset.images_table(0), {FINGERPRINT: "1"}), (dataset.scores(0), {})):
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"uid": ["a"]}, schema.with_metadata(metadata)), path)
    dataset.images_tar(0).write_bytes(b"tar")
    images, scores = [dataset.images_tar(0), dataset.images_table(0)], [dataset.scores(0)]
    for stage, paths in (("download", images), ("score", scores)):
        outputs = describe_outputs(dataset, paths)
        write_entry(dataset, ShardReport(stage=stage, shard=0, num_in=1, num_out=1, outputs=outputs))
        key = f"{parse_url(dataset.url).prefix}/manifest/{stage}/00000.json"
        store.client.delete_object(Bucket=BUCKET, Key=key)
    mirror_of(dataset).sync()
    assert [list(entries(dataset, stage)) for stage in ("download", "score")] == [[], []]
    assert [path.exists() for path in (*images, *scores)] == [True, True, False]


def test_a_process_that_has_an_old_list_deletes_what_came_since(dataset):
    mirror = Mirror(dataset, parse_url(dataset.url))
    mirror.may_write = lambda: None
    assert not mirror.has("images/00000.tar", 1)  # its list of objects is made here
    download(dataset, 0)
    dataset.images_tar(0).unlink()
    mirror.discard(dataset.images_tar(0))
    assert mirror_of(dataset).store.digest("images/00000.tar") is None


def test_an_entry_under_a_stages_former_name_is_read_and_leaves_every_machine(dataset, store, tmp_path):
    """`decide` was called `keep`."""
    prefix = parse_url(dataset.url).prefix
    content = write(dataset, "keep", 0, [dataset.decisions])
    write_entry(dataset, content)
    old = store.objects(prefix)["manifest/decide/00000.json"].replace(b'"decide"', b'"keep"')
    store.client.put_object(Bucket=BUCKET, Key=f"{prefix}/manifest/keep/00000.json", Body=old)
    store.client.delete_object(Bucket=BUCKET, Key=f"{prefix}/manifest/decide/00000.json")

    first, second = (replace(dataset, root=tmp_path / name) for name in ("first", "second"))
    for machine in (first, second):
        mirror_of(machine).sync()
        assert machine.manifest_entry("decide", 0).parent.name == "keep"
        (entry,) = entries(machine, "decide")
        assert entry.stage == "decide"
        assert is_whole(machine, entry)
        fetch_tables(machine)
        assert machine.decisions.exists()

    mirror_of(first).may_write = mirror_of(dataset).may_write
    forget_entry(first, "decide", 0)
    assert not [name for name in store.objects(prefix) if name.startswith("manifest/")]
    write_entry(first, write(first, "decide", 0, [first.decisions]))
    assert [name for name in store.objects(prefix) if name.startswith("manifest/")] == ["manifest/decide/00000.json"]
    mirror_of(second).sync(may_delete=False)  # which leaves the stale entry
    assert second.manifest_entry("decide", 0).parent.name == "decide"
    mirror_of(second).sync()
    assert [path.parent.name for path in (second.root / "manifest").rglob("*.json")] == ["decide"]
