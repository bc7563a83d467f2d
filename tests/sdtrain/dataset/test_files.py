from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

from sdtrain.dataset.files import publish


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
