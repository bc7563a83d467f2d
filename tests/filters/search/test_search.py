"""Planted neighbours come first; what was taken out is never found again."""

import io
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from filters.recipe_record import read_recipe
from filters.search.embeddings import embeddings_of
from filters.search.index import forget_index
from filters.search.search import Search
from sdtrain import cli
from sdtrain.errors import UserError
from tests.filters.removal_fixtures import ALIKE, SAME_BYTES, build, caption_of, copy_of, make_photo, remove


def photo(number, quality=90):
    return Image.open(io.BytesIO(make_photo(number, quality))).convert("RGB")


def captions(hits):
    return [hit.caption for hit in hits]


def run(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sdtrain", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return ended.value.code or 0, said.out, said.err


@pytest.mark.parametrize("number", [0, 9, 30])
def test_an_image_is_its_own_nearest_even_when_it_was_saved_anew(search, number):
    (hits,) = search.by_images([photo(number, quality=75)], top=3)
    assert hits[0].caption == caption_of(number)
    assert hits[0].similarity > 0.98
    assert [hit.similarity for hit in hits] == sorted((hit.similarity for hit in hits), reverse=True)


@pytest.mark.parametrize(("copy", "number"), [*SAME_BYTES.items(), *ALIKE.items()])
def test_planted_copies_come_before_all_others_and_say_why_they_were_dropped(search, copy, number):
    (hits,) = search.by_images([photo(number)], top=5)
    first = {hit.caption: hit for hit in hits[:2]}
    assert set(first) == {caption_of(number), caption_of(copy)}
    dropped = {hit.reason for hit in first.values()} - {None}
    assert len(dropped) == 1
    assert dropped.pop().startswith("duplicate")


def test_the_answer_is_that_of_comparing_with_every_embedding(search, embedded_dataset):
    rows = [pq.read_table(embedded_dataset.scores(shard)) for shard, _ in embeddings_of(embedded_dataset).counts]
    uids = [uid for table in rows for uid in table["uid"].to_pylist()]
    stored = np.array([v for table in rows for v in table["embedding"].to_pylist()], np.float64)
    asked = search.embed([photo(17)])[0]
    cosines = stored @ asked / np.linalg.norm(stored, axis=1)
    expected = [uids[place] for place in np.argsort(-cosines)[:10]]
    hits = search.nearest(asked[None], 10)[0]
    assert [hit.uid for hit in hits] == expected
    assert [hit.similarity for hit in hits] == pytest.approx(np.sort(cosines)[::-1][:10], abs=2e-3)


def test_only_kept_ones_are_all_kept_ones(search, embedded_dataset):
    (hits,) = search.by_images([photo(4)], top=100, kept_only=True)
    decisions = pq.read_table(embedded_dataset.decisions).to_pylist()
    assert {hit.uid for hit in hits} == {row["uid"] for row in decisions if row["reason"] is None}
    assert len(hits) < len(search.by_images([photo(4)], top=100)[0])


def test_words_find_the_caption_that_has_them(search):
    assert captions(search.by_words("of ÜNÏQUE caption 012", 3))[0] == caption_of(12)
    assert search.by_words("nothing-like-it", 3) == []
    copies = {hit.reason for number in (4, 20) for hit in search.by_words(caption_of(number), 1)}
    assert copies == {None, "duplicate_exact"}
    assert all(hit.reason is None for hit in search.by_words("caption", 40, kept_only=True))
    assert search.by_words("'; DROP TABLE x; --", 3) == []


def test_the_index_is_made_once_and_anew_after_a_removal_which_leaves_nothing_of_what_is_gone(
    embedded_dataset, photo_site, tmp_path
):
    dataset = copy_of(embedded_dataset, tmp_path)
    before = Search(dataset)
    (hits,) = before.by_images([photo(30)], top=1)
    made = next(dataset.search.glob("*/index.faiss"))
    stamp = made.stat().st_mtime_ns
    Search(dataset).by_images([photo(30)], top=1)
    assert made.stat().st_mtime_ns == stamp
    remove(dataset, "uid", [hits[0].uid])
    assert not dataset.search.exists()
    after = Search(dataset)
    found = after.by_images([photo(30)], top=100)[0]
    assert after.num_images == before.num_images - 1 == len(found)
    assert hits[0].uid not in {hit.uid for hit in found}
    assert after.by_words(hits[0].caption, 1)[0].uid != hits[0].uid
    assert after.by_key(hits[0].key) is None


def test_other_embeddings_get_another_index_and_the_old_one_goes(embedded_dataset, tmp_path):
    dataset = copy_of(embedded_dataset, tmp_path)
    Search(dataset).by_images([photo(1)], top=1)
    (old,) = dataset.search.iterdir()
    recipe = read_recipe(dataset)
    score = recipe.score.model_copy(update={"clip_weights": "random:1"})
    build(dataset, recipe.model_copy(update={"score": score}))
    assert captions(Search(dataset).by_images([photo(1)], top=1)[0]) == [caption_of(1)]
    assert [folder.name for folder in dataset.search.iterdir()] != [old.name]
    assert len(list(dataset.search.iterdir())) == 1


def test_a_damaged_index_is_a_sentence(embedded_dataset, tmp_path):
    dataset = copy_of(embedded_dataset, tmp_path)
    Search(dataset).by_images([photo(1)], top=1)
    next(dataset.search.glob("*/index.faiss")).write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"cannot be read .* Delete it: the next search makes it"):
        Search(dataset).by_images([photo(1)], top=1)


def test_a_missing_table_of_scores_is_a_sentence(embedded_dataset, tmp_path):
    dataset = copy_of(embedded_dataset, tmp_path)
    forget_index(dataset)
    last = max(dataset.scores(0).parent.glob("*.parquet"))
    last.unlink()
    with pytest.raises(UserError, match=rf"{last.name} cannot be read.*Run the build again"):
        Search(dataset).by_images([photo(1)], top=1)


def test_a_dataset_without_embeddings_says_how_to_get_them(photo_dataset):
    with pytest.raises(UserError, match=r"has no embeddings to search\. Set score\.store_embeddings: true"):
        Search(photo_dataset).by_images([photo(1)], top=1)


def test_without_faiss_there_is_a_sentence(search, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"needs faiss\. Install it with `pip install 'sdtrain\[semantic\]'`"):
        search.by_images([photo(1)], top=1)


def test_the_command_answers_as_table_json_and_sheet(embedded_dataset, tmp_path, capsys, monkeypatch):
    asked = tmp_path / "asked.jpg"
    asked.write_bytes(make_photo(6))
    command = ["search", embedded_dataset.root, "--image", asked, "--top", 3]
    code, out, _ = run([*command, "--json"], capsys, monkeypatch)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert {rows[0]["caption"], rows[1]["caption"]} == {caption_of(6), caption_of(22)}
    assert all(row["url"].endswith(".jpg") and row["uid"] and row["key"] for row in rows)
    assert "caption-of-006" in run(command, capsys, monkeypatch)[1]
    for name in ("sheet.png", "sheet.html", "rows.json"):
        assert run([*command, "--output", tmp_path / name], capsys, monkeypatch)[0] == 0
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert Image.open(tmp_path / "sheet.png").width > 600
    assert "data:image/jpeg;base64," in (tmp_path / "sheet.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{data}"], "Give one of"),
        (["{data}", "x", "--serve"], "Give one of"),
        (["{data}", "--image", "{tmp}/none.png"], "cannot be read"),
        (["{data}", "--image", "{tmp}/text.png"], "cannot be read as an image"),
        (["{data}", "x", "--output", "{tmp}/x.gif"], "A sheet of images ends in .png or .html"),
        (["{tmp}/nowhere", "x"], "nowhere"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(arguments, sentence, embedded_dataset, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    filled = [argument.format(data=embedded_dataset.root, tmp=tmp_path) for argument in arguments]
    code, _, err = run(["search", *filled], capsys, monkeypatch)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err


def test_kept_ones_before_anything_is_decided_is_a_sentence(embedded_dataset, tmp_path):
    dataset = copy_of(embedded_dataset, tmp_path)
    dataset.decisions.unlink()
    assert Search(dataset).by_images([photo(1)], top=1)[0][0].status == "undecided"
    with pytest.raises(UserError, match="not built as far as `decide`"):
        Search(dataset).by_images([photo(1)], top=1, kept_only=True)


def test_a_recipe_of_other_weights_is_a_sentence(embedded_dataset, tmp_path):
    dataset = copy_of(embedded_dataset, tmp_path)
    text = dataset.recipe.read_text()
    dataset.recipe.write_text(text.replace("clip_weights: random:0", "clip_weights: random:7"))
    with pytest.raises(UserError, match="was scored with CLIP ViT-demo"):
        Search(dataset).by_images([photo(1)], top=1)
