"""The columns of metadata and scores, under our names."""

from __future__ import annotations

from typing import Literal

# Our name -> its DuckDB type, and its case-insensitive names in LAION's releases, COYO and DataComp; the first present
# wins. `original_width` comes first because img2dataset's `width` is that of the resized image.
_METADATA: dict[str, tuple[str, ...]] = {
    "url": ("VARCHAR", "url"),
    "caption": ("VARCHAR", "text", "caption"),
    "width": ("INTEGER", "original_width", "width"),
    "height": ("INTEGER", "original_height", "height"),
    "similarity": ("DOUBLE", "similarity", "clip_similarity_vitb32", "clip_b32_similarity_score"),
    "hash": ("BIGINT", "hash"),
    "pwatermark": ("DOUBLE", "pwatermark", "watermark_score"),
    "punsafe": ("DOUBLE", "punsafe"),
    "aesthetic": ("DOUBLE", "aesthetic_score", "aesthetic_score_laion_v2"),
    "aesthetic_v1": ("DOUBLE", "aesthetic_v1", "aesthetic"),  # LAION's first predictor: another scale, never mixed
    "language": ("VARCHAR", "language"),
    "nsfw": ("VARCHAR", "nsfw"),
    "md5": ("VARCHAR", "md5"),  # of the image's bytes; `hash` is of URL and caption
    "sha256": ("VARCHAR", "sha256"),
    "source_row": ("BIGINT", "sdtrain_source_row"),  # of an imported image, see `sdtrain.download.source.catalogue`
}
TYPES = {ours: sql_type for ours, (sql_type, *_) in _METADATA.items()}
ALIASES = {ours: tuple(names) for ours, (_, *names) in _METADATA.items()}
SCORE_COLUMNS = ("aesthetic", "aesthetic_v1", "pwatermark", "punsafe", "similarity")
"""Image scores by networks, any of which the metadata may have too."""
QUALITY_COLUMNS = ("sharpness", "entropy", "border", "contrast")
"""Measured on the decoded image alone; see `filters.score.preprocess`."""
UNDECODABLE = "undecodable"
"""The drop reason of an image that no decoder reads."""

Table = Literal["metadata", "selection", "images", "scores"]
"""Tables that rules read: `select` reads the metadata; `decide` joins selection, images and scores."""
TABLES: dict[str, frozenset[Table]] = {
    **dict.fromkeys(ALIASES, frozenset({"metadata"})),
    **dict.fromkeys(("url", "caption"), frozenset({"metadata", "selection"})),
    **dict.fromkeys(("width", "height"), frozenset({"metadata", "images"})),  # of the image as downloaded
    **dict.fromkeys(SCORE_COLUMNS, frozenset({"metadata", "selection", "scores"})),
    **dict.fromkeys(QUALITY_COLUMNS, frozenset({"scores"})),
}

SwappedSizes = Literal["auto", "yes", "no"]
"""Whether the metadata's WIDTH and HEIGHT are exchanged; "auto": in LAION's raw releases."""

RESERVED = frozenset(
    {
        *TABLES,
        *("key", "uid", "shard", "tar", "filename", "extension", "picture_offset", "picture_bytes", "sample_key"),
        *("original_width", "original_height", "original_md5", "exif", "error_message", "status", "reason", "kind"),
        *(
            "phash",
            "pixels",
            "pixels_sha256",
            "embedding",
            "sscd_embedding",
            "miniature",
            "group_id",
            "clip_similarity",
            "list_reason",
            "is_removed",
            "area",
        ),
        *("pixel_sha256", "offset", "num_bytes", "size_in_metadata", "image_height", "image_width", "thumbnail"),
        *("side", "aspect_ratio", "caption_chars", "caption_words", "caption_is_name", "download_reason"),
        *("score_reason", "file_row_number", "place", "rule_reason", "answers"),
    }
)
"""Names, in lower case, that a user's own column may not have in our tables, because others of ours have them."""
