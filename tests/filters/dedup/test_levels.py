"""Which groups come out: what comparing all with all gives, in any order, in pieces of any size, in bounded memory."""

import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.dedup import columns, perceptual, union_find
from filters.dedup.columns import COLOR_BYTES
from filters.dedup.perceptual import MAX_COLOR_DIFFERENCE
from filters.dedup.union_find import Components
from tests.filters.dedup.duplicate_fixtures import (
    alike,
    distinct_colors,
    groups_by_brute_force,
    groups_of,
    looks_table,
    planted_hashes,
    search,
    with_embeddings,
)

RADIUS = 4


def equal(values: list[object]) -> np.ndarray:
    """(N, N) whether values are equal and known."""
    return np.array([[a == b and a is not None for b in values] for a in values]).reshape(len(values), len(values))


def crowded_looks(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Few hashes and few colours, so that many images share one or both, or nearly."""
    rng = np.random.default_rng(seed)
    hashes = rng.choice(planted_hashes(40, seed), num)
    colors = np.zeros((num, COLOR_BYTES), np.uint8)
    colors[:, :4] = rng.integers(0, 3, (num, 4)) * rng.choice([9, 16, 17], (num, 1))
    return hashes, colors


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_those_of_comparing_all_with_all(seed):
    hashes, colors = crowded_looks(300, seed)
    expected = groups_by_brute_force([np.eye(300, dtype=bool), alike(hashes, colors, RADIUS)])
    assert groups_of(looks_table(hashes, colors), radius=RADIUS) == expected


def test_pieces_of_any_size_give_the_same_groups(monkeypatch):
    hashes, colors = crowded_looks(300, 9)
    pixels = (np.arange(300) % 290).tolist()
    expected = groups_of(looks_table(hashes, colors, pixels))
    for module, name, size in (
        *((columns, "_ROWS_AT_ONCE", 13), (union_find, "_ROWS_AT_ONCE", 7), (perceptual, "_CHUNK_PAIRS", 5)),
        (perceptual, "_LARGE_RUN", 3),
    ):
        monkeypatch.setattr(module, name, size)
        assert groups_of(looks_table(hashes, colors, pixels)) == expected


@st.composite
def small_worlds(draw):
    """A few images, many of which share pixels, files, looks or embeddings, and an order in which to give them."""
    num = draw(st.integers(1, 14))
    of = lambda values: draw(st.lists(values, min_size=num, max_size=num))  # noqa: E731
    bits = of(st.sampled_from([0, 0b1, 0b11, 0b11111, 0b111111111, 1 << 63, (1 << 63) | 1]))
    shades = np.array(of(st.sampled_from([0, 10, 16, 17, 30, 33, 200])), np.uint8)
    angles = np.array(of(st.sampled_from([0.0, 0.2, 0.3, 0.5, 1.5, 3.0])))
    return {
        "hashes": np.array(bits, np.uint64),
        "colors": np.repeat(shades[:, None], COLOR_BYTES, axis=1),
        "pixels": of(st.integers(0, 12)),
        "files": of(st.one_of(st.none(), st.integers(0, 12))),
        "vectors": np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16),
        "order": draw(st.permutations(range(num))),
        "level": draw(st.sampled_from(["exact", "perceptual", "semantic"])),
    }


@given(small_worlds())
@settings(max_examples=20, deadline=None)
def test_groups_are_the_components_of_the_relation_in_whatever_order_images_come(world):
    table = looks_table(world["hashes"], world["colors"], world["pixels"], world["files"])
    table = with_embeddings(table, world["vectors"])
    wide = world["vectors"].astype(float)
    cosines = wide @ wide.T / np.linalg.norm(wide, axis=1) / np.linalg.norm(wide, axis=1)[:, None]
    relations = [
        equal(world["pixels"]) | equal(world["files"]),
        alike(world["hashes"], world["colors"], RADIUS),
        cosines >= 0.97,
    ]
    levels = ("exact", "perceptual", "semantic")
    expected = groups_by_brute_force(relations[: 1 + levels.index(world["level"])])
    options = {"level": world["level"], "radius": RADIUS, "semantic_threshold": 0.97}
    assert groups_of(table, **options) == expected
    mixed = table.take(pa.array(world["order"]))
    assert search(mixed.slice(0, 3), mixed.slice(3), **options) == search(table, **options)


@given(st.lists(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=8), max_size=6))
def test_components_do_not_depend_on_how_links_are_split(batches):
    at_once, one_by_one = Components(20), Components(20)
    pairs = [pair for batch in batches for pair in batch]
    if pairs:
        at_once.link(*np.array(pairs).T)
    for pair in reversed(pairs):
        one_by_one.link(*np.array([pair]).T)
    nodes = np.arange(20)
    assert at_once.roots(nodes).tolist() == one_by_one.roots(nodes).tolist()
    assert at_once.num_linked == one_by_one.num_linked == 20 - len(set(at_once.roots(nodes).tolist()))
    assert np.flatnonzero(at_once.grouped()).tolist() == sorted(
        {i for pair in pairs if pair[0] != pair[1] for i in pair}
    )


def test_colours_decide_between_images_of_one_hash():
    colors = np.zeros((4, COLOR_BYTES), np.uint8)
    colors[1, 7], colors[2, 7], colors[3] = MAX_COLOR_DIFFERENCE, MAX_COLOR_DIFFERENCE + 1, 255
    # 1 and 2 are alike too, so the three are one group; the fourth is not.
    found = groups_of(looks_table(np.full(4, 5, np.uint64), colors), radius=0)
    assert found == dict.fromkeys(range(3), (0, "perceptual"))


def test_each_level_counts_what_it_would_drop_and_the_kinds_add_up_to_that_of_the_recipe():
    hashes, colors = crowded_looks(300, 3)
    table = looks_table(hashes, colors, (np.arange(300) % 280).tolist())
    (found, rows), (off, none) = search(table), search(table, level="off")
    groups = {row["group_id"] for row in rows}
    assert found.removed == off.removed
    assert found.removed["exact"] == 20
    assert found.removed["perceptual"] == sum(found.dropped.values()) == len(rows) - len(groups)
    assert (off.dropped, none) == ({}, [])


@pytest.mark.parametrize("alike_", [False, True], ids=["all unlike", "all alike"])
def test_images_of_one_hash_and_many_colours_take_memory_by_their_number(alike_):
    num = 4000
    colors = (
        np.random.default_rng(0).integers(250, 256, (num, COLOR_BYTES), np.uint8) if alike_ else distinct_colors(num)
    )
    table = looks_table(np.full(num, 1 << 63, np.uint64), colors)
    tracemalloc.start()
    found, _ = search(table)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.removed["perceptual"] == (num - 1 if alike_ else 0)
    assert peak_bytes < 50_000_000


def test_thousands_of_blank_images_cost_no_square():
    num = 50_000
    hashes = np.concatenate([np.full(num, 1 << 63, np.uint64), planted_hashes(200, 1)])
    colors = np.concatenate([np.full((num, COLOR_BYTES), 255, np.uint8), np.zeros((200, COLOR_BYTES), np.uint8)])
    table = looks_table(hashes, colors)
    started = time.perf_counter()
    found = groups_of(table)
    assert time.perf_counter() - started < 5
    assert [found[i][0] for i in range(num)] == [0] * num
