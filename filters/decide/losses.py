"""Warns of a rule, a duplicate level or a failure that drops nearly every sample, with the likely cause."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from filters.decide.funnel import FunnelRow
from filters.recipe import Recipe
from filters.rules import RULES
from sdtrain.dataset.removal_ledger import REMOVED
from sdtrain.models.weights import RANDOM, RANDOM_FULL

MIN_SAMPLES = 20
"""Of fewer, all may well be dropped for one reason."""
_NEARLY_ALL, _NEARLY_ALL_ROWS = 0.95, 0.98  # of raw metadata, a narrow subset rightly drops more

_MEANT = {"over_limit", REMOVED}
_SCALES = {
    "aesthetic": "1 to 10",
    "aesthetic_v1": "1 to 10",
    "pwatermark": "0 to 1",
    "punsafe": "0 to 1",
    "similarity": "-1 to 1, and pairs that match lie around 0.3",
    "entropy": "0 to 8 bits",
    "border": "0 to 1",
}
_NETWORKS = {
    "aesthetic": ("clip", "aesthetic"),
    "aesthetic_v1": ("clip", "aesthetic_v1"),
    "pwatermark": ("watermark",),
    "punsafe": ("clip", "safety"),
    "similarity": ("clip",),
    "duplicate_copied": ("sscd",),
    "duplicate_semantic": ("clip",),
}
"""By score or reason: the networks of `score` that it comes from."""
_PLACEHOLDER = "many hosts answer with one placeholder such as “image not available”; the report shows the pairs"
_LINK = "the URLs may be of another time or place than their hosts now serve"
_NETWORK = "this machine's network, proxy or name server may be at fault; `sdtrain build --retry-failed` tries again"
_REFUSED = "the hosts refuse: see download.contact and download.requests_per_host_s"
_OPT_OUT = "the hosts opt out; are they the ones that you meant?"
_CAUSES = {
    "url_missing": "the column read as `url` may not be the one that holds URLs; select.columns names another",
    "url_not_allowed": "the column read as `url` may not hold whole http(s) URLs; select.columns names another",
    "blocklisted": "a blocklist may be of another kind than its `by` says, or name a host that has nearly all",
    "not_allowlisted": "the allowlist may be of another kind than its `by` says, or of other metadata",
    "duplicate_row": "the metadata may be there twice, as files of two releases or copies of one folder",
    "duplicate_exact": _PLACEHOLDER,
    "duplicate_perceptual": f"duplicates.radius may be too large, or {_PLACEHOLDER}",
    "duplicate_copied": "duplicates.copy_similarity may be too low for these images",
    "duplicate_semantic": "duplicates.semantic_threshold may be too low for these images",
    "hash_mismatch": "the metadata's digests may be of other files, such as resized ones",
    "not_an_image": "the URLs may lead to pages instead of images",
    "undecodable": "the files under images/ may have been damaged after the download",
    "too_many_pixels": "download.max_pixels may be too low for these images",
    "too_large": "download.max_bytes may be too low for these images",
    **dict.fromkeys(("http_404", "http_410"), _LINK),
    **dict.fromkeys(("http_403", "http_429"), _REFUSED),
    **dict.fromkeys(("robots_header", "robots_txt", "tdm_reserved"), _OPT_OUT),
    **dict.fromkeys(("timeout", "dns_failed", "connection_failed", "tls_failed", "blocked_address"), _NETWORK),
}


def heavy_losses(funnel: Iterable[FunnelRow], recipe: Recipe, stage: str | None = None) -> list[str]:
    """Returns a sentence for each reason that dropped nearly all samples that came to it, of `stage` or of all.

    Nearly all is 95 % of at least `MIN_SAMPLES`, and 98 % of the metadata's rows; removals and `limit` are meant.
    """
    return list(_sentences(funnel, recipe, stage))


def _sentences(funnel: Iterable[FunnelRow], recipe: Recipe, stage: str | None) -> Iterator[str]:
    for row in funnel:
        reached = row["dropped"] + row["remaining"]
        is_asked = stage in (None, row["stage"]) and row["reason"] not in _MEANT
        least = _NEARLY_ALL_ROWS if row["stage"] == "select" else _NEARLY_ALL
        if is_asked and reached >= MIN_SAMPLES and row["dropped"] >= least * reached:
            yield (
                f"{row['stage']}: {row['reason']} dropped {row['dropped']:,} of the {reached:,} that came to it "
                f"({row['meaning']}). Likely cause: {_cause(row['stage'], row['reason'], recipe)}."
            )


def _cause(stage: str, reason: str, recipe: Recipe) -> str:
    column = RULES[reason].column if reason in RULES else reason.removesuffix("_missing")
    is_of_ours = stage != "select" and (recipe.decide.decide_by != "metadata" or reason.startswith("duplicate_"))
    if is_of_ours and (random := _random_networks(column, recipe)):
        named = " and ".join(f"score.{name}_weights" for name in random)
        return f"{named} {'are' if len(random) > 1 else 'is'} random, so these scores mean nothing"
    if reason in _CAUSES:
        return _CAUSES[reason]
    if reason in RULES or reason in recipe.select.carry:
        scale = f"; {column} goes from {_SCALES[column]}" if column in _SCALES else ""
        return f"the limit of {stage}.rules.{reason} may be too strict for these samples{scale}"
    if reason.endswith("_missing") and stage == "select":
        return f"the metadata may lack a column that is read as {column}: see select.columns, joins and null_policy"
    if reason.endswith("_missing"):
        return f"neither the metadata nor the networks of score give {column}: see decide.decide_by and score"
    return f"not known; `sdtrain query DATASET \"FROM decisions WHERE reason = '{reason}'\"` lists them"


def _random_networks(column: str, recipe: Recipe) -> list[str]:
    weights = {name: getattr(recipe.score, f"{name}_weights") for name in _NETWORKS.get(column, ())}
    return [name for name, given in weights.items() if given and given.startswith((RANDOM, RANDOM_FULL))]
