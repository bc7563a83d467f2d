import itertools
import threading
import time

import pytest

from sdtrain.images.prefetch import prefetch


def is_running():
    return any(thread.name == "in-background" for thread in threading.enumerate())


def test_items_come_in_their_order_none_among_them():
    assert list(prefetch(iter([3, None, 1]), 2)) == [3, None, 1]


def test_no_more_than_the_depth_is_made_ahead():
    made = []
    items = prefetch((made.append(i) or i for i in itertools.count()), 2)
    next(items)
    time.sleep(0.3)
    assert len(made) <= 4  # one used, two in the queue, one waiting to be put there
    items.close()
    assert not is_running()


def test_an_error_comes_after_the_items_before_it_and_ends_the_thread():
    def broken():
        yield 1
        raise ValueError("no more")

    items = prefetch(broken(), 2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more"):
        next(items)
    assert not is_running()
