"""The funnel goes from all metadata rows to the kept samples, and its counts add up."""

import pytest

from filters.decide.funnel import funnel
from filters.pipeline import STAGES
from sdtrain.dataset.manifest import require_entry, write_entry
from sdtrain.errors import UserError
from tests.filters.dataset_fixtures import make_dataset


def test_each_drop_is_counted_once_and_the_rest_is_what_is_kept(tmp_path):
    dataset, recipe = make_dataset(tmp_path)
    rows = [tuple(row.values()) for row in funnel(dataset, recipe, STAGES)]
    assert rows == [
        ("select", "", "rows of the metadata", 0, 40),
        ("select", "min_side", "shorter side under 512 px", 5, 35),
        ("download", "http_404", "the page does not exist (404)", 2, 33),
        ("download", "not_an_image", "what came is not an image that can be decoded", 1, 32),
        ("download", "timeout", "the server was too slow", 1, 31),
        ("score", "undecodable", "the stored image cannot be decoded", 1, 30),
        ("decide", "min_side", "shorter side under 512 px", 2, 28),
        ("decide", "duplicate_exact", "the same pixels as a kept image", 1, 27),
    ]


def test_counts_that_do_not_add_up_are_refused(tmp_path):
    dataset, recipe = make_dataset(tmp_path)
    entry = require_entry(dataset, "download", 1)
    write_entry(dataset, entry.model_copy(update={"num_out": entry.num_out + 1, "num_in": entry.num_in + 1}))
    with pytest.raises(UserError, match="do not add up: after stage 'download'"):
        funnel(dataset, recipe, STAGES)


def test_an_unfinished_stage_is_named(tmp_path):
    dataset, recipe = make_dataset(tmp_path)
    dataset.manifest_entry("score", 2).unlink()
    with pytest.raises(UserError, match="Shard 00002 of stage 'score' is not finished"):
        funnel(dataset, recipe, STAGES)
