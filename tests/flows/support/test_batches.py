"""The sizes of batches: every shard once, in order; a minute each, but not too many nor too few."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from flows.build_dataset import build_dataset
from flows.support.batches import MAX_TASKS, TASK_S, WINDOW_PER_WORKER, Batches, ShardsPerTask, measured_before
from flows.support.stage_runner import StageOptions
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import write_entry
from sdtrain.dataset.shard_report import ShardReport


def run_all(batches: Batches, workers: int, seconds: Callable[[int], float]) -> list[list[int]]:
    """The batches of a stage whose shards take so long; one of those that run, drawn at random, finishes next."""
    taken: list[list[int]] = []
    running: deque[list[int]] = deque()
    chance = random.Random(workers)
    while batches.num_left or running:
        while batches.num_left and len(running) < batches.window(workers):
            running.append(batches.take(workers))
            taken.append(running[-1])
        running.rotate(-chance.randrange(min(workers, len(running))))
        batches.measured([seconds(shard) for shard in running.popleft()])
    return taken


@settings(max_examples=40, deadline=None)
@given(
    num_shards=st.integers(1, 9_000),
    workers=st.integers(1, 800),
    each_s=st.floats(0, 500),
    before=st.lists(st.floats(0.001, 500), max_size=5),
    given_size=st.one_of(st.just("auto"), st.integers(1, 300)),
)
def test_every_shard_comes_once_in_order_and_the_number_of_tasks_has_bounds(
    num_shards: int, workers: int, each_s: float, before: list[float], given_size: ShardsPerTask
) -> None:
    shards = [3 * i for i in range(num_shards)]
    taken = run_all(Batches(shards, given_size, before), workers, lambda shard: each_s)
    assert [shard for batch in taken for shard in batch] == shards
    assert all(taken)
    if given_size == "auto":
        assert min(num_shards, 2 * workers) <= len(taken) <= MAX_TASKS
    else:
        assert {len(batch) for batch in taken[:-1]} <= {given_size}


def test_a_stage_of_laion_size_begins_with_single_shards_and_has_at_most_2_000_tasks() -> None:
    taken = run_all(Batches(range(132_000), "auto"), 8, lambda shard: 4.0)
    assert [len(batch) for batch in taken[:8]] == [1] * 8
    assert 1_900 <= len(taken) <= 2_000
    assert max(map(len, taken)) <= 1.1 * 132_000 / 2_000


def test_where_few_tasks_suffice_each_takes_a_minute() -> None:
    taken = run_all(Batches(range(10_000), "auto"), 8, lambda shard: 4.0)
    assert {len(batch) for batch in taken[100:-1]} == {15}


def test_first_shards_that_load_networks_are_soon_outweighed() -> None:
    sizes = list(map(len, run_all(Batches(range(1_500), "auto"), 4, lambda shard: 40.0 if shard < 4 else 1.0)))
    assert sizes[:5] == [1] * 5
    assert max(sizes[:12]) < 10
    assert sizes[-2] == TASK_S


def test_one_odd_shard_does_not_make_hours_of_work() -> None:
    sizes = list(map(len, run_all(Batches(range(1_500), "auto"), 2, lambda shard: 0.01 if shard == 0 else 30.0)))
    assert sizes[2] == 2
    assert max(sizes) * 30 < 10 * TASK_S
    assert set(sizes[-50:-1]) == {2}


def test_earlier_runs_give_the_size_from_the_first_task_on() -> None:
    batches = Batches(range(5_000), "auto", [600.0] * 50 + [6.0] * 100)
    assert len(batches.take(2)) == 10
    assert batches.window(2) == WINDOW_PER_WORKER * 2
    assert batches.remark == "5,000 shards to do, 10 per task (one takes about 6 s)"
    batches.take(2)
    assert batches.remark == ""


def test_nothing_measured_because_all_fail_makes_no_more_tasks() -> None:
    batches, sizes = Batches(range(132_000), "auto"), []
    while batches.num_left:
        sizes.append(len(batches.take(4)))
    assert len(sizes) <= MAX_TASKS
    assert sizes[:5] == [1, 1, 1, 1, 67]


def test_measured_seconds_are_those_of_the_manifest_in_the_order_of_finishing(tmp_path: Path) -> None:
    dataset = DatasetDir(tmp_path)
    for shard, (seconds, finished_at) in enumerate([(5.0, 300.0), (0.0, 200.0), (7.0, 100.0)]):
        report = ShardReport(stage="six", shard=shard, num_in=0, num_out=0, seconds=seconds, finished_at=finished_at)
        write_entry(dataset, report)
    assert measured_before(dataset, "six") == [7.0, 5.0]
    assert measured_before(dataset, "seven") == []


@pytest.mark.parametrize("value", [20, "auto"])
def test_flow_takes_a_number_or_auto(value: object) -> None:
    assert TypeAdapter(ShardsPerTask).validate_python(value) == value
    assert build_dataset.validate_parameters({"shards_per_task": value})["shards_per_task"] == value


@pytest.mark.parametrize("value", [0, -1, "all", 1.5])
def test_flow_refuses_another_size(value: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(ShardsPerTask).validate_python(value)


def test_auto_is_the_default_and_the_page_offers_both() -> None:
    schema = build_dataset.parameters.model_dump()["properties"]["shards_per_task"]
    assert schema["default"] == StageOptions().shards_per_task == "auto"
    assert [(option["type"], option.get("minimum"), option.get("const")) for option in schema["anyOf"]] == [
        ("integer", 1, None),
        ("string", None, "auto"),
    ]
