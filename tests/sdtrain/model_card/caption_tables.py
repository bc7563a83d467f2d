"""Tables of a dataset as a build leaves them, with captions, URLs and fates that a test chooses."""

import hashlib
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import write_entry
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.download.rows import SCHEMA

COLLECTED_S = 1_762_000_000.0
"""1 November 2025."""


def write_tables(root, rows, rows_a_shard=100):
    """`rows` are (url, caption, reason, message): a reason of the download has a message, one of the decision none."""
    dataset, decided = DatasetDir(root), []
    for folder in (root / "images", root / "manifest"):
        folder.mkdir(parents=True, exist_ok=True)
    for shard, first in enumerate(range(0, len(rows), rows_a_shard)):
        images = []
        part = rows[first : first + rows_a_shard]
        for place, (url, caption, reason, message) in enumerate(part, first):
            uid = hashlib.md5(f"{url}\n{caption}\n{place}".encode()).hexdigest()
            known = {"uid": uid, "key": f"{place:09d}", "url": url, "caption": caption}
            images.append(dict.fromkeys(SCHEMA.names) | known | {"reason": reason and message and reason})
            images[-1]["error_message"] = message
            decided.append({"uid": uid, "key": f"{place:09d}", "shard": shard, "reason": reason})
        pq.write_table(pa.Table.from_pylist(images, SCHEMA), dataset.images_table(shard))
        lost = Counter(reason for *_, reason, message in part if message)
        nums = {"num_in": len(part), "num_out": len(part) - lost.total(), "dropped": dict(lost)}
        write_entry(
            dataset, ShardReport(stage="download", shard=shard, finished_at=COLLECTED_S + 86400 * shard, **nums)
        )
    schema = pa.schema([("uid", pa.string()), ("key", pa.string()), ("shard", pa.int32()), ("reason", pa.string())])
    pq.write_table(pa.Table.from_pylist(decided, schema), dataset.decisions)
    dropped = Counter(row["reason"] for row in decided if row["reason"])
    nums = {"num_in": len(decided), "num_out": len(decided) - dropped.total(), "dropped": dict(dropped)}
    write_entry(dataset, ShardReport(stage="decide", shard=0, **nums))
    return dataset
