import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.exposure.removed_rows import NO_ROW, SCHEMA
from sdtrain.exposure.shard_rows import ShardRows, ranks

removals = st.lists(st.sets(st.integers(0, 30), max_size=5), max_size=5)


def history(num_rows, taken):
    """The samples after each removal, and what the removals record; a removal that takes no row rewrites texts."""
    samples, rows = [list(range(num_rows))], []
    for number, chosen in enumerate(taken):
        before = samples[-1]
        here = sorted(row for row in chosen if row < len(before))
        stated = {"removal": number, "before": f"d{number}", "after": f"d{number + 1}", "num_rows": len(before)}
        rows += [stated | {"row": row} for row in here] or [stated | {"row": NO_ROW}]
        samples.append([sample for row, sample in enumerate(before) if row not in here])
    return samples, pa.Table.from_pylist(rows, SCHEMA)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 31), removals)
def test_rows_before_any_removal_are_those_that_were(num_rows, taken):
    samples, removed = history(num_rows, taken)
    shard = ShardRows(len(samples[-1]), f"d{len(taken)}", removed, np.arange(len(removed)) + 100)
    numbers = removed["removal"].to_pylist(), removed["row"].to_pylist()
    gone = {-101 - n: samples[number][row] for n, (number, row) in enumerate(zip(*numbers, strict=True)) if row >= 0}
    for number, expected in enumerate(samples):
        names = shard.at(f"d{number}").tolist()
        assert [gone[name] if name < 0 else samples[-1][name] for name in names] == expected
    assert shard.at("another") is None


def test_a_removal_that_never_began_counts_for_nothing_and_a_shard_made_again_for_unknown():
    _, removed = history(6, [{1}, {2}])
    place = SCHEMA.get_field_index("after")
    pending = removed.set_column(place, SCHEMA.field(place), pa.array(["d1", None], pa.string()))
    assert ShardRows(5, "d1", pending, np.arange(2)).at("d0").tolist() == [0, -1, 1, 2, 3, 4]
    assert ShardRows(4, "made again", removed, np.arange(2)).at("d0") is None
    assert ShardRows(3, "d2", removed, np.arange(2)).at("d0") is None  # not as many rows as the removals leave


def test_ranks_count_equal_elements_before():
    assert ranks(np.array([5, 5, 3, 5, 3])).tolist() == [0, 1, 0, 2, 1]
