"""A sample's captions travel from their tables to packed JSON and latents, and a removal takes them out of all."""

import pyarrow.parquet as pq
import pytest

from filters.caption.duplicates import duplicate_texts
from filters.exposure import find
from filters.pipeline import STAGES
from filters.recipe_record import read_recipe
from filters.search.search import Search
from sdtrain.dataset.manifest import require_entry
from sdtrain.dataset.stage import pending
from sdtrain.exposure.document import use_rows
from sdtrain.exposure.exposures import find_exposures
from sdtrain.pack.captions import sources_in
from tests.filters.caption.caption_fixtures import build_captioned, latents_rows, packed_json
from tests.filters.removal_fixtures import (
    build,
    caption_of,
    copy_of,
    files_with,
    find_removal_of,
    members_of,
    remove,
    rows_of,
    uid_of,
)
from tests.sdtrain.exposure.run_fixtures import config_of, record_run, replay
from tests.training_fixtures import write_models


@pytest.fixture(scope="module")
def captioned(photo_site, tmp_path_factory):
    return build_captioned(tmp_path_factory.mktemp("captioned"), photo_site[1])[0]


@pytest.fixture
def copied(captioned, tmp_path):
    dataset = copy_of(captioned, tmp_path)
    build(dataset, read_recipe(dataset))  # its metadata lie elsewhere now
    return dataset


def expected(port, own, *others):
    numbers = [own, *others]
    return {(caption_of(n), uid_of(n, port)) for n in numbers}


def found(captions):
    assert {caption["source"] for caption in captions} == {"alt"}
    return {(caption["text"], caption["origin_uid"]) for caption in captions}


def test_a_packed_sample_and_its_latent_carry_the_captions_of_its_duplicates(captioned, photo_site):
    port, rows = photo_site[1], latents_rows(captioned)
    kept = [packed_json(captioned, stage) for stage in ("dataset", "latents")]
    assert kept[0].keys() == kept[1].keys() == rows.keys()
    pairs = {4: 20, 5: 21, 6: 22}
    of_number = {uid_of(n, port): n for n in (0, 1, 2, 8, *pairs, *pairs.values())}
    for uid in rows:
        number = of_number[uid]
        other = [{**pairs, **{b: a for a, b in pairs.items()}}[number]] if number not in (0, 1, 2, 8) else []
        for captions in (*(json[uid]["captions"] for json in kept), rows[uid]["captions"]):
            assert found(captions) == expected(port, number, *other)
            assert captions[0]["origin_uid"] == uid, "its own comes first"
        assert rows[uid]["caption"] == kept[0][uid]["caption"] == caption_of(number)


def test_a_second_build_does_nothing_and_the_tables_name_the_sources(captioned):
    assert all(pending(stage, captioned, read_recipe(captioned)) == [] for stage in STAGES)
    for table in (captioned.packed_table(0), captioned.latents_table(0)):
        assert sources_in(pq.read_schema(table).metadata) == ("alt",)


def test_after_the_removal_of_a_duplicate_no_file_holds_its_text(copied, photo_site):
    port = photo_site[1]
    kept = set(latents_rows(copied))
    gone = next(n for n in (6, 22) if uid_of(n, port) not in kept)
    stays = 28 - gone
    before = rows_of(copied), members_of(copied)
    assert duplicate_texts(copied, read_recipe(copied).caption, 0)  # kept until a build's end
    assert len(files_with(copied.root, [caption_of(gone)])) > 5
    removal = remove(copied, "uid", [uid_of(gone, port)])
    assert removal.num_samples == 1
    assert files_with(copied.root, [caption_of(gone), uid_of(gone, port)]) == []
    assert build(copied, read_recipe(copied)) == []
    left = packed_json(copied)[uid_of(stays, port)]["captions"]
    assert found(left) == expected(port, stays)
    assert found(latents_rows(copied)[uid_of(stays, port)]["captions"]) == expected(port, stays)
    after = rows_of(copied), members_of(copied)
    changed = [name for name in after[1] if after[1][name] != before[1][name]]
    assert {name.rpartition(".")[2] for name in changed} == {"json"}, "no latent and no image changes"
    assert len(changed) == 2
    entry = require_entry(copied, "caption", 0)
    assert entry.num_in == entry.num_out == require_entry(copied, "score", 0).num_out


def test_after_the_removal_of_the_kept_image_its_captions_go_with_it(copied, photo_site):
    port = photo_site[1]
    uid = next(uid_of(n, port) for n in (5, 21) if uid_of(n, port) in latents_rows(copied))
    assert find_removal_of(copied, [uid]).num_same_bytes == 1
    remove(copied, "uid", [uid])
    captions = [row for shard in (0, 1) for row in pq.read_table(copied.captions_table(shard)).to_pylist()]
    assert not [row for row in captions if uid in (row["uid"], row["origin_uid"])]
    assert uid not in packed_json(copied)
    assert build(copied, read_recipe(copied)) == []


def test_a_removal_killed_between_two_files_ends_the_same(copied, photo_site, monkeypatch):
    from sdtrain.encode import stage as encode

    port = photo_site[1]
    gone = next(n for n in (6, 22) if uid_of(n, port) not in latents_rows(copied))

    def killed(*args, **values):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode, "delete_index", killed)  # after the latents' table and tar
        with pytest.raises(KeyboardInterrupt):
            remove(copied, "uid", [uid_of(gone, port)])
    build(copied, read_recipe(copied))
    assert files_with(copied.root, [caption_of(gone), uid_of(gone, port)]) == []
    assert build(copied, read_recipe(copied)) == []


def test_words_find_images_by_the_captions_of_duplicates(captioned, photo_site):
    port = photo_site[1]
    (hit,) = Search(captioned).by_words(caption_of(22), 1, kept_only=True)
    kept = {uid_of(n, port): n for n in (6, 22)}
    assert hit.uid in kept
    assert hit.uid in latents_rows(captioned)
    assert hit.found_in == ("" if kept[hit.uid] == 22 else f"alt: {caption_of(22)}")
    everywhere = Search(captioned).by_words(caption_of(22), 2)
    assert [found.similarity for found in everywhere] == [1.0, 1.0]
    assert {found.uid: found.found_in for found in everywhere} == {
        uid_of(22, port): "",
        uid_of(6, port): f"alt: {caption_of(22)}",
    }


def test_exposed_tells_the_caption_of_each_use_and_traces_shards_that_lost_only_a_text(copied, photo_site, tmp_path):
    port, models = photo_site[1], write_models(tmp_path / "models")
    data = {"root": str(copied.root), "resolution": 32, "captions": {"alt": 1.0}}
    config = config_of(tmp_path, models, data, vae="demo", steps=60, caption_dropout=0.3)
    run = record_run(tmp_path / "run", config, checkpoints=(2,))
    drawn, kept = replay(config), list(latents_rows(copied))

    def told():
        exposures = find_exposures(run, find.Search("uid", kept))
        assert exposures.remarks == []
        return {(use["step"], use["position"]): (use["uid"], use["caption"]) for use in use_rows(exposures)}

    expected = {at: (sample.uid, "" if sample.is_dropped else sample.caption) for at, sample in drawn.items()}
    assert told() == expected
    gone, stays = sorted((6, 22), key=lambda n: uid_of(n, port) in kept)
    assert {caption_of(gone), caption_of(stays)} <= {caption for _, caption in expected.values()}
    remove(copied, "uid", [uid_of(gone, port)])
    after = told()
    assert {at: uid for at, (uid, _) in after.items()} == {at: uid for at, (uid, _) in expected.items()}
    changed = {uid for at, (uid, caption) in after.items() if (uid, caption) != expected[at]}
    assert uid_of(stays, port) in changed, "what it was called then is not known any more"
    assert all(caption is None for uid, caption in after.values() if uid in changed)


def test_without_the_stage_nothing_is_packed_but_what_was(photo_dataset):
    assert all("captions" not in sample for sample in packed_json(photo_dataset).values())
    assert pq.read_schema(photo_dataset.packed_table(0)).metadata is None
    assert "captions" not in pq.read_schema(photo_dataset.latents_table(0)).names
