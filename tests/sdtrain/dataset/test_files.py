from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

from sdtrain.dataset.files import numbered_files, one_process_at_a_time, publish


def test_threads_that_publish_one_file_at_the_same_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    together = Barrier(4, timeout=10)

    def write(text: str) -> None:
        with publish(tmp_path / "info.json") as temporary:
            temporary.write_text(text)
            together.wait()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, ["a", "b", "c", "d"]))
    assert (tmp_path / "info.json").read_text() in {"a", "b", "c", "d"}
    assert [path.name for path in tmp_path.iterdir()] == ["info.json"]


def test_work_that_is_needed_once_is_done_by_one_at_a_time(tmp_path: Path) -> None:
    inside = Event()

    def work() -> None:
        with one_process_at_a_time(tmp_path):
            inside.set()

    with ThreadPoolExecutor(1) as pool:
        with one_process_at_a_time(tmp_path):
            waiting = pool.submit(work)
            assert not inside.wait(0.1)
        waiting.result(10)
    assert inside.is_set()
    assert list(tmp_path.iterdir()) == []


def test_numbered_files_come_in_the_order_of_their_numbers_and_others_are_left_out(tmp_path: Path) -> None:
    for name in ("100000.tar", "99999.tar", "00007.tar", "00007.parquet", "2024-06.tar"):
        (tmp_path / name).touch()
    found = numbered_files(tmp_path, ".tar")
    assert [(number, path.name) for number, path in found.items()] == [
        (7, "00007.tar"),
        (99_999, "99999.tar"),
        (100_000, "100000.tar"),
    ]
