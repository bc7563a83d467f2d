from collections import Counter
from dataclasses import replace

import pytest

from sdtrain.demo.images import SEEN_PAIRS, UNSEEN_PAIRS
from sdtrain.demo.rows import MIN_ROWS, SHARES, plan_rows
from sdtrain.errors import UserError


def test_unseen_pairs_never_occur_and_seen_pairs_are_balanced() -> None:
    pairs = Counter((row.scene.color, row.scene.shape) for row in plan_rows(2000, 0) if row.kind == "ok")
    assert not UNSEEN_PAIRS & pairs.keys()
    assert set(pairs) == set(SEEN_PAIRS)
    assert max(pairs.values()) < 2 * min(pairs.values())


def test_every_kind_occurs_even_in_the_smallest_world() -> None:
    kinds = Counter(row.kind for row in plan_rows(MIN_ROWS, 3))
    assert set(kinds) == {*SHARES, "ok"}
    assert sum(kinds.values()) == MIN_ROWS


def test_about_1500_good_images_and_few_that_hang() -> None:
    kinds = Counter(row.kind for row in plan_rows(2000, 0))
    assert 1500 <= kinds["ok"] + kinds["flaky"] + kinds["redirect"] <= 1600
    assert kinds["hang"] <= 4


def test_good_rows_pass_the_rules_and_bad_scores_do_not() -> None:
    for row in plan_rows(500, 1):
        if row.kind in ("ok", "flaky", "redirect", "exact_duplicate", "near_duplicate"):
            assert min(row.listed_px) >= 512
            assert row.aesthetic is not None
            assert 5.01 <= row.aesthetic <= 7.5
            assert row.pwatermark is not None
            assert row.pwatermark < 0.5
        elif row.kind == "watermarked":
            assert row.pwatermark is not None
            assert 0.6 <= row.pwatermark <= 0.98
        elif row.kind == "spoiled":
            assert row.aesthetic is not None
            assert row.aesthetic < 5
        elif row.kind == "null_scores":
            assert row.pwatermark is None or row.aesthetic is None
        elif row.kind == "small_row":
            assert min(row.listed_px) < 512
        elif row.kind == "small_picture":
            assert min(row.listed_px) >= 512 > min(row.size_px)


def test_copies_show_the_scene_of_a_good_row_under_another_url() -> None:
    rows = plan_rows(500, 2)
    copies = [row for row in rows if row.source is not None]
    assert copies
    assert len({row.path for row in rows}) == len(rows)
    for row in copies:
        assert row.source is not None
        original = rows[row.source]
        assert original.kind == "ok"
        assert original.scene == row.scene
        assert (original.file == row.file) == (row.kind == "exact_duplicate")


def test_one_host_fails_most() -> None:
    failed = Counter(row.host for row in plan_rows(2000, 0) if row.kind in ("not_found", "forbidden", "server_error"))
    (_, most), (_, second) = failed.most_common(2)
    assert most > 2 * second


def test_too_small_a_world_is_refused_with_a_sentence() -> None:
    with pytest.raises(UserError, match="too small"):
        plan_rows(MIN_ROWS - 1, 0)


def test_a_share_of_alt_texts_says_nothing_of_its_image_and_all_else_stays() -> None:
    good, poor = plan_rows(500, 1), plan_rows(500, 1, useless=0.8)
    changed = [row for row, other in zip(poor, good, strict=True) if row != other]
    assert all(replace(row, text=other.text) == other for row, other in zip(poor, good, strict=True))
    assert 0.74 < len(changed) / sum(row.text is not None for row in good) < 0.86
    assert not any(row.scene.color in row.text or row.scene.shape in row.text for row in changed)
