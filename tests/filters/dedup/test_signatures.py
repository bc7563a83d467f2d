import numpy as np
import pytest

from filters.dedup import proposals
from filters.dedup.proposals import Entries, key_bits, propose
from filters.dedup.signatures import SIGNATURE_BYTES, PlaneSignatures, signatures_of
from sdtrain.images.miniature import Planes, miniature, planes_of
from tests.image_fixtures import scene_image

NUM = 24


@pytest.fixture(scope="module")
def planes() -> Planes:
    contents = [miniature(scene_image(i, 256, 256)) for i in range(NUM)]
    return planes_of(np.frombuffer(b"".join(contents), np.uint8).reshape(NUM, -1))


def found(planes: Planes) -> dict[str, PlaneSignatures]:
    return {signatures.plane: signatures for signatures in signatures_of(planes)}


def differing_bits(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.bitwise_count(ones ^ others).sum(axis=1)


def test_the_signature_of_a_mirror_image_needs_no_mirrored_pixels(planes):
    mirrored = found(Planes(*(plane[..., ::-1] for plane in planes)))
    for plane, signatures in found(planes).items():
        assert np.array_equal(signatures.mirrored, mirrored[plane].whole)
        assert np.array_equal(signatures.whole, mirrored[plane].mirrored)


def test_no_bit_depends_on_which_other_images_are_computed_with_it(planes):
    order = np.random.default_rng(0).permutation(NUM)[: NUM // 2]
    some = found(Planes(*(plane[order] for plane in planes)))
    for plane, signatures in found(planes).items():
        for view in ("whole", "mirrored", "center"):
            values = getattr(signatures, view)
            assert values is None or np.array_equal(values[order], getattr(some[plane], view))


def test_brightness_is_in_no_bit_and_flat_planes_have_no_signature(planes):
    darker = Planes(planes.luma // 2, planes.chroma, planes.dark // 2, planes.bright // 2)
    brighter = Planes(*(plane + np.uint8(99) for plane in darker))
    assert np.array_equal(found(darker)["dark"].whole, found(brighter)["dark"].whole)
    flat = found(Planes(*(np.full_like(plane, 128) for plane in planes)))
    assert not any(signatures.known.any() for signatures in flat.values())


def test_the_centre_of_an_image_has_nearly_the_signature_of_the_cropped_copy():
    images = [scene_image(i, 320, 320) for i in range(NUM)]
    cropped = [image.crop((8, 8, 312, 312)) for image in images]
    whole, copies = (
        found(planes_of(np.stack([np.frombuffer(miniature(p.resize((256, 256))), np.uint8) for p in some])))["luma"]
        for some in (images, cropped)
    )
    center = differing_bits(whole.center, copies.whole)
    assert np.median(center) <= 3
    assert np.median(differing_bits(whole.whole, copies.whole)) > 2 * np.median(center)


def near_signatures(num: int, seed: int) -> np.ndarray:
    """Random signatures, half of which are others with 0 to 30 bits flipped."""
    rng = np.random.default_rng(seed)
    bits = rng.random((num, 8 * SIGNATURE_BYTES)) < 0.5
    for i in range(num // 2, num):
        bits[i] = bits[rng.integers(num // 2)]
        bits[i, rng.choice(bits.shape[1], int(rng.integers(31)), replace=False)] ^= True
    return np.packbits(bits, axis=1)


def entries_of(num: int, seed: int) -> Entries:
    views = tuple(near_signatures(num, seed + view) for view in range(3))
    return Entries(np.arange(num) % 7 != 0, views, np.arange(num, dtype=np.uint64))


def pairs_of(entries: Entries) -> list[tuple[int, int, bool]]:
    pieces = list(propose(entries, "luma"))
    return sorted(
        (*sorted(pair[:2]), pair[2])
        for piece in pieces
        for pair in zip(*(values.tolist() for values in piece), strict=True)
    )


def by_brute_force(entries: Entries) -> list[tuple[int, int, bool]]:
    """Pairs with a common key of the tables, and few differing bits."""
    num, bits = entries.num, key_bits(entries.num)
    allowed = {(0, 0): False, (0, 1): True, (1, 0): True, (0, 2): False, (2, 0): False, (1, 2): True, (2, 1): True}
    expected = []
    for (one, other), mirrored in allowed.items():
        for i in np.flatnonzero(entries.known):
            near = differing_bits(entries.views[one][i], entries.views[other]) <= proposals._MAX_DIFFERING_BITS
            together = np.zeros(num, bool)
            for table in range(SIGNATURE_BYTES):
                keys = [proposals._keys(entries.views[view], table, bits) for view in (one, other)]
                together |= keys[0][i] == keys[1]
            for j in np.flatnonzero(near & together & entries.known):
                if i < j:
                    expected.append((int(i), int(j), mirrored))
    return sorted(expected)


@pytest.mark.parametrize("rows", [1 << 25, 100])
def test_pairs_with_an_equal_key_and_few_other_differing_bits_come_once_for_two_views(rows, monkeypatch):
    monkeypatch.setattr(proposals, "_ROWS_AT_ONCE", rows)
    monkeypatch.setattr(proposals, "_ROWS_IN_CACHE", 64 if rows == 100 else 1 << 18)
    entries = entries_of(300, 1)
    expected = by_brute_force(entries)
    assert len(expected) > 50
    assert pairs_of(entries) == expected


def test_a_crowd_of_one_signature_costs_no_square_and_its_order_does_not_matter(monkeypatch):
    monkeypatch.setattr(proposals, "_MAX_NEIGHBOURS", 8)
    num = 500
    signatures = np.repeat(near_signatures(2, 3)[:1], num, axis=0)
    order = np.random.default_rng(0).permutation(num)
    ties = np.arange(num, dtype=np.uint64)
    inverse = np.argsort(order)
    found = pairs_of(Entries(np.ones(num, bool), (signatures,), ties))
    mixed = pairs_of(Entries(np.ones(num, bool), (signatures,), ties[inverse]))
    assert len(found) <= 8 * num
    assert sorted((*sorted((int(inverse[i]), int(inverse[j]))), m) for i, j, m in mixed) == found
    assert {i for pair in found for i in pair[:2]} == set(range(num))


def test_keys_grow_with_the_number_of_images():
    assert [key_bits(num) for num in (10, 1_000_000, 100_000_000)] == [20, 24, 31]
