"""Pauses between attempts."""

import email.utils
import time

import pytest

from sdtrain.download.http.retry import LONGEST_PAUSE_S, backoff_s, retry_after_s


@pytest.mark.parametrize(("header", "seconds"), [("0", 0), (" 120 ", 120), ("0007", 7)])
def test_retry_after_in_seconds(header, seconds):
    assert retry_after_s(header) == seconds


@pytest.mark.parametrize("header", [None, "", "-1", "1.5", "soon", "9" * 400, "Mon, 99 Foo", "١٢"])
def test_retry_after_that_says_nothing(header):
    assert retry_after_s(header) is None


def test_retry_after_as_a_date():
    assert retry_after_s(email.utils.formatdate(time.time() + 90, usegmt=True)) == pytest.approx(90, abs=1.1)
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_pauses_grow_are_bounded_and_never_in_step():
    for attempt in range(12):
        drawn = [backoff_s(attempt) for _ in range(400)]
        longest = min(LONGEST_PAUSE_S, 0.5 * 2**attempt)
        assert 0 <= min(drawn) < 0.1 * longest
        assert 0.9 * longest < max(drawn) <= longest
        assert len(set(drawn)) > 390
