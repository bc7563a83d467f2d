import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, write_entry
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.tars import write_samples
from sdtrain.errors import UserError
from sdtrain.evaluation import reference
from sdtrain.evaluation.reference import open_reference
from tests.sdtrain.evaluation.evaluation_fixtures import write_images


def test_a_folder_is_its_images_and_their_digest_is_of_their_bytes(tmp_path):
    folder = write_images(tmp_path / "a", 5)
    (folder / "readme.txt").write_text("no image")
    found = open_reference(folder, 100)
    assert len(found.places) == 5
    assert "5 of 5 images" in found.source
    assert open_reference(write_images(tmp_path / "b", 5), 100).digest == found.digest
    (folder / "004.png").write_bytes((folder / "003.png").read_bytes())
    assert open_reference(folder, 100).digest != found.digest


HIDDEN = ("._000.png", ".DS_Store", ".hidden/a.png", "@eaDir/000.png/SYNO_THUMB.jpg", "Thumbs.db", "__MACOSX/._1.jpg")


def test_hidden_files_are_no_images_and_nested_ones_and_upper_case_are(tmp_path):
    folder = write_images(tmp_path / "a", 3)
    known = open_reference(folder, 100)
    for name in HIDDEN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no image")
    (folder / "folder.jpg").mkdir()
    assert open_reference(folder, 100) == known
    (folder / "Photos").mkdir()
    (folder / "000.png").rename(folder / "Photos" / "A.PNG")
    (folder / "001.png").rename(folder / "Photos" / "B.v2.PNG")
    assert [Path(place.path).name for place in open_reference(folder, 100).places] == ["002.png", "A.PNG", "B.v2.PNG"]


def test_tars_of_others_are_read_as_webdataset_does(tmp_path):
    bodies = [path.read_bytes() for path in sorted(write_images(tmp_path / "a", 4).iterdir())]
    names = ["photo.v2.png", "b.jpeg", "Sub/C.JPG", "d.webp"]
    members = [("._photo.v2.png", b"x"), ("b.json", b"{}"), ("d.seg.png", b"x"), *zip(names, bodies, strict=True)]
    tars = tmp_path / "tars"
    (tars / "nested").mkdir(parents=True)
    with tarfile.open(tars / "nested" / "Shard.TAR", "w") as tar:
        for name, body in sorted(members):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    found = open_reference(tars, 100)
    assert sorted(place.read() for place in found.places) == sorted(bodies)
    assert "1 tars, 4 of 4 images" in found.source
    assert open_reference(tars / "nested" / "Shard.TAR", 100).places == found.places
    write_samples(tmp_path / "texts.tar", [("a", {"txt": b"a"}), ("b", {"txt": b"b"})])
    with pytest.raises(UserError, match="2 samples and no image: they have txt"):
        open_reference(tmp_path / "texts.tar", 100)


WILD = Path(__file__).parents[4] / "shared" / "data" / "wild"


@pytest.mark.skipif(not WILD.is_dir(), reason="the files are handed out with the project, not committed")
def test_dotted_keys_as_they_occur_outside_are_read():
    assert len(open_reference(WILD / "dotted-keys.tar", 100).places) == 2


def test_of_many_images_the_seed_chooses(tmp_path):
    folder = write_images(tmp_path / "a", 9)
    few, again, other = (open_reference(folder, 3, seed) for seed in (0, 0, 1))
    assert few.places == again.places != other.places
    assert "3 of 9 images" in few.source


def test_a_dataset_is_its_packed_images(tmp_path):
    bodies = [path.read_bytes() for path in sorted(write_images(tmp_path / "a", 4).iterdir())]
    dataset = DatasetDir(tmp_path / "data")
    for shard in range(2):
        tar = dataset.packed_tar(shard)
        tar.parent.mkdir(parents=True, exist_ok=True)
        samples = [(f"{i:09d}", {"png": bodies[i], "txt": b"a"}) for i in (2 * shard, 2 * shard + 1)]
        write_samples(tar, samples)
    found = open_reference(dataset.root, 100)
    assert [place.read() for place in found.places] == bodies
    # Where the manifest has a shard's digest, its images need not be read to know them.
    for shard in range(2):
        outputs = describe_outputs(dataset, [dataset.packed_tar(shard)])
        write_entry(dataset, ShardReport(stage="pack", shard=shard, num_in=2, num_out=2, outputs=outputs))
    known = open_reference(dataset.root, 100)
    assert (known.places, known.digest == found.digest) == (found.places, False)
    outputs[dataset.relative(dataset.packed_tar(1))].sha256 = "0" * 64
    write_entry(dataset, ShardReport(stage="pack", shard=1, num_in=2, num_out=2, outputs=outputs))
    assert open_reference(dataset.root, 100).digest != known.digest


def test_only_the_shards_of_chosen_images_are_looked_into(tmp_path, monkeypatch):
    dataset, bodies = DatasetDir(tmp_path / "data"), {}
    dataset.images_tar(0).parent.mkdir(parents=True)
    for shard in range(6):
        own = {f"{shard:05d}{i:04d}": f"image {shard} {i}".encode() for i in range(3)}
        placed = write_samples(dataset.images_tar(shard), [(key, {"jpg": body}) for key, body in own.items()])
        places = [sample.members["jpg"] for sample in placed]
        # The first row's image was not fetched.
        columns = {
            "picture_offset": [None, *(m.offset for m in places)],
            "picture_bytes": [None, *(m.size for m in places)],
        }
        pq.write_table(pa.table(columns), dataset.images_tar(shard).with_suffix(".parquet"), row_group_size=2)
        bodies |= own
    everything = open_reference(dataset.root, 100)
    assert [place.read() for place in everything.places] == list(bodies.values())
    looked, images_in = [], reference._images_in
    monkeypatch.setattr(reference, "_images_in", lambda tar: looked.append(tar) or images_in(tar))
    for most in (1 << 27, 5):  # also where there are too many for a permutation
        monkeypatch.setattr(reference, "_MOST_PERMUTED", most)
        looked.clear()
        few = open_reference(dataset.root, 2, 3)
        assert len(set(few.places) & set(everything.places)) == 2
        assert {str(tar) for tar in looked} == {place.path for place in few.places}
        assert few.source == "data: dataset, 2 of 18 images, seed 3"


def test_tars_beside_tables_of_others_are_read_by_their_headers(tmp_path):
    """As img2dataset writes them: its tables do not say where in the tar an image lies."""
    bodies = [path.read_bytes() for path in sorted(write_images(tmp_path / "a", 3).iterdir())]
    tar = DatasetDir(tmp_path / "data").images_tar(0)
    tar.parent.mkdir(parents=True)
    write_samples(tar, [(f"{i:09d}", {"png": body, "txt": b"a"}) for i, body in enumerate(bodies)])
    pq.write_table(pa.table({"url": ["u"] * 3, "status": ["success"] * 3}), tar.with_suffix(".parquet"))
    assert [place.read() for place in open_reference(tmp_path / "data", 100).places] == bodies


def test_a_dataset_without_images_is_not_taken_for_a_folder(tmp_path):
    dataset = DatasetDir(tmp_path / "data")
    write_images(dataset.root / "pictures", 3)  # as a report has them
    dataset.recipe.write_text("name: little\n")
    with pytest.raises(UserError, match="is a dataset that holds no images yet"):
        open_reference(dataset.root, 100)


def test_statistics_in_pytorch_fids_form(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.arange(3.0), sigma=np.eye(3, dtype=np.float32))
    found = open_reference(tmp_path / "s.npz", 100)
    assert found.places == ()
    assert found.statistics.mean.tolist() == [0, 1, 2]
    assert found.statistics.covariance.dtype == np.float64


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"mu": np.zeros(3)}, "does not hold `mu` and `sigma`"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "do not fit each other"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "not finite"),
        ({"mu": np.array([{}], object), "sigma": np.eye(1)}, "does not hold `mu` and `sigma`"),
    ],
    ids=["no_sigma", "sizes", "nan", "pickled"],
)
def test_other_statistics_are_a_sentence_and_nothing_is_unpickled(tmp_path, arrays, sentence):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UserError, match=sentence):
        open_reference(tmp_path / "s.npz", 100)


def test_a_file_that_is_no_npz_and_nothing_at_all_are_sentences(tmp_path):
    (tmp_path / "s.npz").write_text("no zip")
    with pytest.raises(UserError, match="does not hold"):
        open_reference(tmp_path / "s.npz", 100)
    with pytest.raises(UserError, match="There is no file"):
        open_reference(tmp_path / "t.npz", 100)
    with pytest.raises(UserError, match=r"A reference is a dataset, a folder of images .* or an \.npz"):
        open_reference(tmp_path / "nothing", 100)


def test_too_few_images_are_a_sentence(tmp_path):
    with pytest.raises(UserError, match="holds 1 images; a reference needs two"):
        open_reference(write_images(tmp_path / "a", 1), 100)
