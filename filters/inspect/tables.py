"""What metadata.duckdb shows: the columns of each view, the views made from them, and what they say."""

from __future__ import annotations

from filters.columns import QUALITY_COLUMNS, SCORE_COLUMNS

_TEXT, _INT, _LONG, _REAL = "VARCHAR", "INTEGER", "BIGINT", "DOUBLE"

# Columns of a view whose stage is not finished; finished ones show what their files hold.
EMPTY: dict[str, dict[str, str]] = {
    "selection": {
        **dict.fromkeys(("key", "uid", "url", "caption"), _TEXT),
        **dict.fromkeys(("width", "height"), _INT),
        "similarity": _REAL,
        "hash": _LONG,
        **dict.fromkeys(("pwatermark", "punsafe", "aesthetic", "aesthetic_v1"), _REAL),
        "shard": _INT,
    },
    "images": {
        **dict.fromkeys(("url", "caption", "uid", "key", "status", "error_message"), _TEXT),
        **dict.fromkeys(("width", "height", "original_width", "original_height"), _INT),
        **dict.fromkeys(("exif", "sha256", "reason", "size_in_metadata"), _TEXT),
        "phash": _LONG,
        "extension": _TEXT,
        **dict.fromkeys(("picture_offset", "picture_bytes"), _LONG),
        "shard": _INT,
        "tar": _TEXT,
    },
    "scores": {
        **dict.fromkeys(("uid", "key", "pixel_sha256"), _TEXT),
        "phash": _LONG,
        "thumbnail": "BLOB",
        **dict.fromkeys(("image_width", "image_height"), _INT),
        **dict.fromkeys(SCORE_COLUMNS, "FLOAT"),
        **dict.fromkeys(QUALITY_COLUMNS, "FLOAT"),
        "reason": _TEXT,
        "shard": _INT,
    },
    "duplicates": dict.fromkeys(("uid", "group_id", "kind"), _TEXT),
    "decisions": {"uid": _TEXT, "key": _TEXT, "shard": _INT, "reason": _TEXT},
    "packed": {
        **dict.fromkeys(("uid", "key", "extension"), _TEXT),
        **dict.fromkeys(("picture_offset", "picture_bytes"), _LONG),
        "shard": _INT,
        "tar": _TEXT,
    },
    "latents": {
        **dict.fromkeys(("uid", "key", "caption", "url"), _TEXT),
        **dict.fromkeys(("offset", "num_bytes"), _LONG),
        **dict.fromkeys(("height", "width"), _INT),
        "shard": _INT,
        "tar": _TEXT,
    },
}

# Views over the views above.
DERIVED: dict[str, str] = {
    "kept": (
        "SELECT d.uid, d.key, d.shard, s.url, s.caption, s.similarity, s.pwatermark, s.punsafe, s.aesthetic, i.width, "
        "i.height, i.original_width, i.original_height, i.sha256, i.tar "
        "FROM decisions d JOIN selection s USING (uid) JOIN images i USING (uid) WHERE d.reason IS NULL"
    ),
    "drops": (
        "SELECT d.uid, d.key, s.url, s.caption, CASE WHEN i.reason IS NOT NULL THEN 'download' "
        "WHEN d.reason = 'undecodable' THEN 'score' ELSE 'keep' END AS stage, d.reason, i.error_message "
        "FROM decisions d JOIN selection s USING (uid) LEFT JOIN images i USING (uid) WHERE d.reason IS NOT NULL"
    ),
    "score_pairs": (
        "SELECT c.uid, c.key, c.shard, "  # noqa: S608 - names are from here
        + ", ".join(f"s.{name} AS {name}_metadata, c.{name} AS {name}_image" for name in SCORE_COLUMNS)
        + " FROM scores c JOIN selection s USING (uid) WHERE c.reason IS NULL"
    ),
    "hosts": (
        "SELECT lower(regexp_extract(url, '^[a-zA-Z]+://(?:[^/?#]*@)?([^/?#:]+)', 1)) AS host, count(*) AS tried, "
        "count(reason) AS failed, mode(reason) AS usual_reason FROM images GROUP BY host"
    ),
}

COMMENTS: dict[str, str] = {
    "metadata": "Every row of the metadata that the recipe names, under one set of column names",
    "selection": "Rows chosen from the metadata, in download order",
    "images": "One row for every selected row: the image as img2dataset stored it, or the reason it is not there",
    "scores": "One row for every downloaded image: our scores, measures of quality and hashes",
    "duplicates": "Images that are copies of one another: those with one group_id",
    "decisions": "One row for every selected row: kept (reason is NULL), or the first reason that dropped it",
    "packed": "Kept samples, and where they lie in the WebDataset shards",
    "latents": "Encoded samples, and where their moments lie in the latents shards",
    "kept": "Kept samples with caption, LAION's scores and sizes",
    "drops": "Selected rows that were dropped: at which stage and why",
    "score_pairs": "LAION's scores beside ours, for every image that could be decoded",
    "hosts": "Hosts, how many URLs of each were tried and how many failed",
    "remarks": "The published size of the subset beside ours, and how odd metadata was handled",
    "funnel": "From metadata rows to kept samples: what each reason dropped and how many remain",
    "stages": "What each stage did with each shard, in how many seconds, and the bytes it wrote",
}
