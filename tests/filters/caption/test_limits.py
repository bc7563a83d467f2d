"""Limits on captions decide which are packed; an image for which none passes keeps its own alt text."""

import json
import tarfile

import pytest

from filters.caption.stage import CAPTION, decoded_images
from filters.caption.table import Caption, write_captions
from filters.decide.stage import DECIDE
from sdtrain.dataset.manifest import selected_shards
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.errors import UserError
from sdtrain.pack.stage import PACK
from tests.chat_server import MODEL, chat_server, completion
from tests.filters.caption.test_generate import NO_NETWORKS, finish_before, recipe_of
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads

LONG = "a very long description " * 30
SAID = {
    0: [("short", "near", 0.5), ("long", LONG, 0.6)],
    1: [("short", "far", 0.1)],
    2: [("short", "unmeasured", None)],
}
PACKED_BY = {
    (): {0: ["alt 0", "near", LONG], 1: ["alt 1", "far"], 2: ["alt 2", "unmeasured"]},
    (("min_caption_similarity", 0.5),): {0: ["near", LONG], 1: ["alt 1"], 2: ["alt 2"]},
    (("max_caption_tokens", 77),): {0: ["alt 0", "near"], 1: ["alt 1", "far"], 2: ["alt 2", "unmeasured"]},
    (("min_caption_similarity", 0.1), ("max_caption_tokens", 77)): {0: ["near"], 1: ["far"], 2: ["alt 2"]},
}
SCORE = NO_NETWORKS | {"clip_model": "ViT-demo", "clip_weights": "random:0"}


def recipe_with(server, limits):
    endpoint = {"url": server.url, "model": MODEL}
    return recipe_of({"endpoint": endpoint, **dict(limits)}, score=SCORE)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    rows = [Fetched(encoded(scene_image(number)), f"alt {number}") for number in SAID]
    dataset = write_downloads(tmp_path_factory.mktemp("limited"), rows)
    with chat_server(lambda asked: completion("a scene")) as server:
        recipe = recipe_with(server, ())
        finish_before(dataset, recipe)
        run_batch(CAPTION, dataset, recipe, selected_shards(dataset))
        uids = [image["uid"] for image in decoded_images(dataset, 0)]
        own = [Caption(uid, "alt", f"alt {number}", uid, 0.05) for number, uid in enumerate(uids)]
        captions = [
            caption
            for number, uid in enumerate(uids)
            for caption in (own[number], *(Caption(uid, s, text, uid, value) for s, text, value in SAID[number]))
        ]
        write_captions(dataset.captions_table(0), captions)
        run_batch(DECIDE, dataset, recipe, [0])
        yield dataset, server, uids


def packed(dataset, uids):
    with tarfile.open(dataset.packed_tar(0)) as tar:
        samples = [json.loads(tar.extractfile(info).read()) for info in tar if info.name.endswith(".json")]
    return {uids.index(one["uid"]): [caption["text"] for caption in one["captions"]] for one in samples}


@pytest.mark.parametrize("limits", PACKED_BY, ids=lambda limits: "-".join(name for name, _ in limits) or "none")
def test_only_captions_within_the_limits_are_packed(captioned, limits):
    dataset, server, uids = captioned
    recipe = recipe_with(server, limits)
    assert pending(PACK, dataset, recipe) == [0]
    run_batch(PACK, dataset, recipe, [0])
    assert packed(dataset, uids) == PACKED_BY[limits]
    assert pending(PACK, dataset, recipe) == []


def test_a_limit_asks_nobody_again_and_needs_clip(captioned):
    dataset, server, _ = captioned
    plain, limited = (recipe_with(server, limits) for limits in ((), (("max_caption_tokens", 77),)))
    assert CAPTION.fingerprint(dataset, plain, 0) == CAPTION.fingerprint(dataset, limited, 0)
    with pytest.raises(UserError, match=r"score\.clip_weights is null"):
        recipe_of({"endpoint": {"url": "http://h/v1", "model": "m"}, "min_caption_similarity": 0.2})
    with pytest.raises(UserError, match=r"needs caption\.similarity: true"):
        recipe_of({"from_duplicates": True, "min_caption_similarity": 0.2}, score=SCORE)
