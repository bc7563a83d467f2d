"""Small files of metadata, and what is selected from them."""

import pyarrow as pa
import pyarrow.parquet as pq

from filters.select.stage import select_rows
from filters.select_config import SelectConfig
from sdtrain.dataset.layout import DatasetDir


def url(number):
    return f"https://example.com/{number}.jpg"


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def select(tmp_path, name="data", num_threads=None, allow_private=False, **settings):
    dataset = DatasetDir(tmp_path / name)
    dataset.root.mkdir(exist_ok=True)
    settings = {"metadata": str(tmp_path / "metadata")} | settings
    report = select_rows(dataset, SelectConfig(**settings), allow_private, num_threads)
    return dataset, report


def rows_of(dataset):
    files = sorted(dataset.selection(0).parent.glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]
