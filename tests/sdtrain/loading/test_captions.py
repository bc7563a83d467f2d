"""A step takes one of a sample's captions by chance: a pure function of seed, step and sample, and of nothing else."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch

from sdtrain.config import TrainConfig, changes, load_config
from sdtrain.config.data import DataConfig
from sdtrain.config.resuming import OnResume, defaults_of_added, rules_of
from sdtrain.errors import UserError
from sdtrain.formats.frozen import load_text_encoder, vae_scaling_factor
from sdtrain.loading import latent_store
from sdtrain.loading.captions import Caption, CaptionMix
from sdtrain.loading.image_store import ImageStore, OnlineVae
from sdtrain.loading.loader import BatchMaker, captions_in_step
from sdtrain.loading.sample_plan import sample_noise
from sdtrain.loading.sources import open_samples
from sdtrain.sampling.batch_view import show_batch
from sdtrain.settings import parse_settings
from tests.sdtrain.encode import caption_fixtures
from tests.sdtrain.encode.caption_fixtures import add_captions, captions_of
from tests.sdtrain.encode.packed_fixtures import Recipe, encode, write_packed
from tests.training_fixtures import write_config

SHARES = {"alt": 0.3, "short": 0.6, "long": 0.1}
ALL = [Caption("alt", "a"), Caption("short", "b"), Caption("alt", "c"), Caption("long", "d")]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Eight samples with captions, and the same without."""
    folder = tmp_path_factory.mktemp("captions")
    found = add_captions(write_packed(folder / "captioned")), write_packed(folder / "plain")
    for dataset in found:
        encode(dataset, Recipe("demo"))
    return found


def config_of(folder, dataset, captions=None, **changed):
    data = {"root": str(dataset.root), "resolution": 64, "captions": captions} | changed.pop("data", {})
    changed = {"vae": "demo", "text_encoder": "demo", "caption_dropout": 0.3, "steps": 40, "data": data} | changed
    return load_config(str(write_config(folder / "run.yaml", dataset.root, dataset.root, **changed)))


def makers(config, world_size=1):
    store, tokenizer = open_samples(config, vae_scaling_factor("demo")), load_text_encoder("demo")[0]
    return [BatchMaker(store, tokenizer, config, rank, world_size) for rank in range(world_size)]


def drawn(config, steps=range(40)):
    (maker,) = makers(config)
    return [maker.drawn(step, position)[1] for step in steps for position in range(config.global_batch_size)]


def share_of(counts, num):
    return {source: count / num for source, count in counts.items()}


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        (("alt", "short", "long"), {"alt": 0.3, "short": 0.6, "long": 0.1}),
        (("alt", "long"), {"alt": 0.75, "long": 0.25}),
        (("short",), {"short": 1.0}),
    ],
)
def test_shares_hold_and_are_divided_anew_where_a_source_is_missing(has, expected):
    mix, num = CaptionMix(SHARES), 20_000
    captions = [caption for caption in ALL if caption.source in has]
    chosen = [mix.choose(7, step, f"{step % 100:032x}", "own", captions) for step in range(num)]
    found = share_of(Counter(caption.source for caption in chosen), num)
    assert found.keys() == expected.keys()
    for source, share in expected.items():
        assert abs(found[source] - share) < 5 * (share * (1 - share) / num) ** 0.5 + 1e-9
    texts = Counter(caption.text for caption in chosen if caption.source == "alt")
    if "alt" in has:  # of two texts of one source, each is as likely
        assert abs(texts["a"] / texts.total() - 0.5) < 5 * 0.5 / texts.total() ** 0.5


def test_the_order_in_which_a_file_names_the_shares_says_nothing():
    one, other = CaptionMix(SHARES), CaptionMix(dict(reversed(SHARES.items())))
    for step in range(100):
        assert one.choose(7, step, "u", "own", ALL) == other.choose(7, step, "u", "own", ALL)


def test_an_order_takes_the_first_source_that_the_sample_has():
    mix = CaptionMix({"first": ("short", "alt")})
    assert mix.choose(7, 3, "u", "own", ALL) == Caption("short", "b")
    without = [caption for caption in ALL if caption.source != "short"]
    found = Counter(mix.choose(7, step, "u", "own", without).text for step in range(200))
    assert found.keys() == {"a", "c"}


def test_a_sample_without_the_sources_has_its_own_alt_text():
    for wanted in (SHARES, {"first": ("short", "alt")}, None):
        assert CaptionMix(wanted).choose(7, 3, "u", "own", ()) == Caption("alt", "own")
    assert CaptionMix({"short": 1.0}).choose(7, 3, "u", "own", ALL[-1:]) == Caption("alt", "own")


def test_the_choice_is_a_function_of_seed_step_and_sample_and_independent_of_the_noise():
    mix = CaptionMix({"alt": 0.5, "short": 0.5})

    def choices(seed, uid):
        return [mix.choose(seed, step, uid, "own", ALL).source for step in range(400)]

    assert choices(1, "u") == choices(1, "u")
    for other in (choices(2, "u"), choices(1, "v")):
        assert 0.4 < np.mean(np.array(choices(1, "u")) == other) < 0.6
    drops = [sample_noise(1, step, "u", 1000, (4, 1, 1)).drop for step in range(400)]
    assert abs(np.corrcoef(drops, [source == "alt" for source in choices(1, "u")])[0, 1]) < 0.2


def test_a_batch_has_the_chosen_captions_and_otherwise_the_numbers_that_it_had(tmp_path, datasets):
    captioned, plain = datasets
    (mixed,), (old,) = makers(config_of(tmp_path, captioned, SHARES)), makers(config_of(tmp_path, plain))
    (unset,) = makers(config_of(tmp_path, captioned))
    num_other = 0
    for step in range(4):
        batches = [maker.make(step, 0) for maker in (mixed, old, unset)]
        for name in ("moments", "posterior", "noise", "timesteps"):
            assert torch.equal(getattr(batches[0], name), getattr(batches[1], name)), name
        assert torch.equal(batches[1].token_ids, batches[2].token_ids), "without the setting all is as it was"
        num_other += int((batches[0].token_ids != batches[1].token_ids).any(dim=1).sum())
    assert num_other > 2


def test_the_captions_are_the_same_on_any_number_of_ranks_and_from_any_step(tmp_path, datasets):
    config = config_of(tmp_path, datasets[0], SHARES)
    (alone,), two = makers(config), makers(config, 2)
    for step in (0, 3, 39):
        one = [alone.make(step, micro_step) for micro_step in range(alone.accumulation)]
        shared = [maker.make(step, 0) for maker in two]
        assert torch.equal(
            torch.cat([batch.token_ids for batch in one]), torch.cat([batch.token_ids for batch in shared])
        )
    later = drawn(config, range(20, 22))
    assert later == drawn(config, range(22))[-len(later) :]


def test_each_sample_is_seen_with_its_own_captions_of_every_source(tmp_path, datasets):
    config = config_of(tmp_path, datasets[0], SHARES)
    seen = {}
    for sample in drawn(config):
        seen.setdefault(int(sample.uid, 16), set()).add((sample.source, sample.caption))
    assert seen == {n: {(each["source"], each["text"]) for each in captions_of(n)} for n in range(8)}


def test_the_captions_of_any_samples_in_a_step_are_those_of_its_batch(tmp_path, datasets):
    config = config_of(tmp_path, datasets[0], SHARES)
    batch = drawn(config, [5])
    store = open_samples(config, vae_scaling_factor("demo"))
    asked = captions_in_step(store, config, 5, np.array([sample.index for sample in batch]))
    assert asked == [Caption(sample.source, sample.caption) for sample in batch]


def test_packed_images_give_the_captions_of_latents(tmp_path, datasets):
    config = config_of(tmp_path, datasets[0], SHARES)
    online = config_of(tmp_path, datasets[0], SHARES, data={"online_vae": True})
    names = ("uid", "caption", "source", "is_dropped")
    assert [[getattr(s, n) for n in names] for s in drawn(online, range(3))] == [
        [getattr(s, n) for n in names] for s in drawn(config, range(3))
    ]


def test_the_last_packed_image_may_have_texts_of_any_length(tmp_path, monkeypatch):
    long = [{"source": "long", "text": "word " * 60_000, "origin_uid": f"{7:032x}"}]
    monkeypatch.setattr(caption_fixtures, "captions_of", lambda number: long)
    dataset = add_captions(write_packed(tmp_path / "data"))
    store = ImageStore(dataset.root, 64, OnlineVae("demo"), reads_captions=True)
    last = store.fetch(np.array([4, 7]), np.zeros(2, np.int64), 0, store.buffer(2, 0))
    assert last.damaged == {}
    assert last.choices[0] == last.choices[1] == [Caption("long", long[0]["text"])]


def test_a_mapped_index_without_captions_is_made_again_with_them(tmp_path, datasets, monkeypatch):
    config, unset = config_of(tmp_path, datasets[0], SHARES), config_of(tmp_path, datasets[0])
    expected = drawn(config, range(2))
    monkeypatch.setattr(latent_store, "_SMALL", 0)
    monkeypatch.setattr(latent_store, "_SMALL_WITH_CAPTIONS", 0)
    index = datasets[0].latents_table(0).with_suffix(".index.arrow")
    assert len(drawn(unset, range(2))) == len(expected)
    without = pa.ipc.open_stream(pa.memory_map(str(index))).schema.names
    assert drawn(config, range(2)) == expected
    assert set(pa.ipc.open_stream(pa.memory_map(str(index))).schema.names) - set(without) == {"captions"}
    assert drawn(unset, range(2)) == drawn(unset, range(2))
    for table in (0, 1):
        datasets[0].latents_table(table).with_suffix(".index.arrow").unlink()


def test_datasets_with_and_without_captions_mix(tmp_path, datasets):
    sources = [{"root": str(dataset.root)} for dataset in datasets]
    seen = drawn(config_of(tmp_path, datasets[0], {"long": 1.0}, data={"sources": sources}), range(6))
    assert {sample.source for sample in seen} == {"alt", "long"}


def test_sources_that_no_sample_has_are_refused_at_the_start(tmp_path, datasets):
    with pytest.raises(UserError, match=r"names shrt, and no sample .* There are: alt, long, short"):
        makers(config_of(tmp_path, datasets[0], {"shrt": 0.5, "alt": 0.5}))
    with pytest.raises(UserError, match=r"names short, and no sample .* There are: alt\."):
        makers(config_of(tmp_path, datasets[1], {"first": ["short", "alt"]}))
    assert drawn(config_of(tmp_path, datasets[1], {"alt": 1}), range(1))


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        ({}, "write shares of sources"),
        ({"first": []}, "write shares of sources"),
        ({"first": ["alt"], "short": 0.5}, "write shares of sources"),
        ({"short": ["alt"]}, "write shares of sources"),
        ({"alt": 0.0, "short": 1}, "more than 0"),
    ],
)
def test_a_choice_that_means_nothing_is_refused(captions, words):
    with pytest.raises(UserError, match=words):
        parse_settings(DataConfig, {"captions": captions}, "config")


def test_cached_embeddings_are_of_alt_texts_only():
    with pytest.raises(UserError, match="only alt texts have cached embeddings"):
        parse_settings(DataConfig, {"captions": SHARES, "text_embeddings": "cached"}, "config")


def test_the_setting_decides_samples_and_leaves_old_digests(tmp_path, datasets):
    old, new = (config_of(tmp_path, datasets[0], captions) for captions in (None, SHARES))
    assert rules_of(TrainConfig)["data.captions"] is OnResume.SAMPLES
    assert defaults_of_added(TrainConfig)["data.captions"] is None
    (change,) = changes(old, new)
    assert (change.name, change.before, change.after) == ("data.captions", None, SHARES)
    assert old.digest() != new.digest()


def test_a_shown_batch_names_the_source(tmp_path, datasets):
    config = config_of(tmp_path, datasets[0], {"first": ["short", "alt"]})
    shown = list(show_batch(config, 2, range(4)))
    for sample in shown:
        number = int(sample.drawn.uid, 16)
        assert sample.drawn.source == ("short" if number % 2 else "alt")
        assert f"(source {sample.drawn.source})" in sample.title()
        assert sample.row()["source"] == sample.drawn.source
