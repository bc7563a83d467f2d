"""The index for many images: lists on the disk, of which a part is compared."""

import shutil

import numpy as np
import pytest

from filters.dedup.columns import Images
from filters.search import index
from filters.search.embeddings import Block, Embeddings
from filters.search.index import ImageIndex, forget_index, open_index
from filters.search.search import Search
from tests.filters.removal_fixtures import copy_of

faiss = pytest.importorskip("faiss")
NUM, WIDTH, TOP = 20_000, 32, 10


def planted():
    """(NUM, WIDTH) of length 1, around 200 subjects."""
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(200, WIDTH))[np.arange(NUM) % 200] + 0.3 * rng.normal(size=(NUM, WIDTH))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def write(vectors, folder, monkeypatch):
    """An index of lists, written in parts that are merged."""
    import pyarrow as pa

    monkeypatch.setattr(index, "EXACT_UP_TO", 100)
    monkeypatch.setattr(index, "_BLOCK_ROWS", 5000)
    monkeypatch.setattr(index, "PROBES", 16)
    starts = range(0, NUM, 2000)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), WIDTH)
    table = pa.table({"uid": [f"{i:032x}" for i in range(NUM)], "embedding": column})

    class Planted(Embeddings):
        def blocks(self):
            return (Block(np.arange(s, s + 2000), vectors[s : s + 2000]) for s in starts)

    images = Images(lambda columns: [table.select(list(columns))], NUM, True)
    embeddings = Planted(None, images, "m", "d", WIDTH, tuple((i, 2000) for i in range(len(starts))))
    made, work = folder / "made", folder / "work"
    made.mkdir()
    work.mkdir()
    (made / "info.json").write_text(index._write_index(embeddings, made, work).model_dump_json())
    shutil.rmtree(work)
    return made.rename(folder / "elsewhere")


def test_lists_on_the_disk_find_nearly_all_of_the_exact_answer(tmp_path, monkeypatch):
    vectors = planted()
    asked = vectors[:: NUM // 100].astype(np.float32)
    found = ImageIndex(write(vectors, tmp_path, monkeypatch))
    assert (found.info.num_lists, found.info.num_vectors) == (round(2 * NUM**0.5), NUM)
    cosines, numbers = found.nearest(asked, TOP)
    exact = np.argsort(-(asked @ vectors.T.astype(np.float32)), axis=1)[:, :TOP]
    recall = np.mean([len(set(a) & set(b)) / TOP for a, b in zip(numbers, exact, strict=True)])
    assert recall > 0.95
    assert numbers[:, 0].tolist() == list(range(0, NUM, NUM // 100))  # each is its own nearest
    assert cosines[:, 0] == pytest.approx(1, abs=2e-3)
    assert found.place(4001) == (2, 1)


def test_a_search_that_is_killed_while_it_writes_leaves_no_index_and_the_next_makes_it(
    embedded_dataset, tmp_path, monkeypatch
):
    dataset = copy_of(embedded_dataset, tmp_path)
    forget_index(dataset)  # other tests search the fixture
    with monkeypatch.context() as patched:
        patched.setattr(index.IndexInfo, "model_dump_json", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_index(dataset)
    assert not dataset.search.exists()
    assert Search(dataset).num_images > 30


def _interrupted(*_args, **_options):
    raise KeyboardInterrupt
