"""The stage DOWNLOAD: turns selected rows into images, and records a reason for each row without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from sdtrain.dataset.config import ImageRecipe
from sdtrain.dataset.files import read_parquet, scratch
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import forget_entry, num_selected_shards, selected_shards
from sdtrain.dataset.rewriting import Removed, Rewriting
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import Drops, Needs, Openers, Stage, Table, always_on, no_openers
from sdtrain.dataset.work import WORK
from sdtrain.download.http.failures import meaning_of
from sdtrain.download.http.proxies import Proxies, environment_variables
from sdtrain.download.image_shards import ImageShard, read_shard_table
from sdtrain.download.publish import drop_images, earlier_images, publish_images, report_images, reuse_images
from sdtrain.download.source.reader import SourceRequest
from sdtrain.download.worker_process import EarlierShard, Finished, Request, ShardRequest, download_process
from sdtrain.errors import UserError

# Settings of how images are fetched, which do not change the images: changing one redoes nothing.
_HOW = {
    *("contact", "timeout_s", "deadline_s", "retries", "connections", "connections_per_host", "requests_per_host_s"),
    *("shards_per_process", "proxy", "ca_file", "unverified_tls"),
}
_MIN_ROWS_TO_TELL = 20
"""From this many rows on, a shard with no reachable host points to a failure of our network, not of theirs."""


def _shards(dataset: DatasetDir, recipe: ImageRecipe) -> list[int]:
    return list(selected_shards(dataset))


def download_fingerprint(dataset: DatasetDir, recipe: ImageRecipe, shard: int) -> str:
    """Digest of all that decides a shard's bytes, except the web's answers."""
    # Of the selection, this shard alone: others may change without affecting it.
    return _fingerprint_of(recipe, selected_shards(dataset)[shard].sha256)


def _fingerprint_of(recipe: ImageRecipe, selection_sha256: str) -> str:
    # Where it is off, the digest is that of earlier versions, which had no such setting.
    unset = set[str]() if recipe.download.scaled_decoding else {"scaled_decoding"}
    config = recipe.download.model_dump(mode="json", exclude=_HOW | unset)
    return fingerprint("download/2", config | {"rows": selection_sha256})


def _run(dataset: DatasetDir, recipe: ImageRecipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    asked = {}
    for shard in shards:
        # A shard being replaced must not pass for finished if this is killed half way.
        forget_entry(dataset, "download", shard)
        digest = download_fingerprint(dataset, recipe, shard)
        report = reuse_images(dataset, shard, selected_keys(dataset, shard), digest)
        if report is not None:
            yield report
        else:
            selection, earlier = dataset.selection(shard), _earlier(dataset, recipe, shard)
            asked[shard] = ShardRequest(shard=shard, selection=selection, fingerprint=digest, earlier=earlier)
    if not asked:
        return
    with scratch(dataset.root, f"download-{shards[0]:05d}") as folder:
        request = new_request(dataset, recipe, folder, list(asked.values()))
        with download_process(request) as finished:
            for done in finished:
                _check_reached(done, recipe)
                yield publish_checked(dataset, request, done)


def _earlier(dataset: DatasetDir, recipe: ImageRecipe, shard: int) -> EarlierShard | None:
    """The shard's version of an earlier selection, if it was made with the same settings."""
    found = earlier_images(dataset, shard, partial(_fingerprint_of, recipe))
    if found is None:
        return None
    # The metadata's digests may have changed too: an image that had not the former ones may have the new ones.
    return EarlierShard(tar=found.tar, table=found.table, retried=["hash_mismatch"], selection_changed=True)


def new_request(dataset: DatasetDir, recipe: ImageRecipe, folder: Path, shards: list[ShardRequest]) -> Request:
    """The request to a download process, which writes to `folder`."""
    removed = dataset.removed if dataset.removed.exists() else None
    source = None
    if recipe.source:
        path, limit = Path(recipe.source.path), recipe.download.max_bytes
        follow = recipe.source.follow_links
        source = SourceRequest(path=path, catalogues=dataset.catalogues, follow_links=follow, max_bytes=limit)
    return Request(config=recipe.download, output=folder, removed=removed, source=source, shards=shards)


def publish_checked(dataset: DatasetDir, request: Request, done: Finished) -> ShardReport:
    """Publishes a finished shard; UserError if its rows are not the selected ones."""
    made = ImageShard.in_folder(request.output, done.shard)
    table = read_shard_table(made.table)
    found, expected = table.keys if table else [], selected_keys(dataset, done.shard)
    if found != expected:
        lost, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        raise UserError(
            f"Samples of shard {done.shard:05d} were lost: {len(found)} rows where {len(expected)} are due "
            f"({len(lost)} missing, {len(extra)} too many: {', '.join((lost or extra)[:3])}). Nothing of the shard "
            "was kept; run the build again, and look into the disk's free space if it comes back."
        )
    return publish_images(dataset, done.shard, made, done.tar_sha256)


def selected_keys(dataset: DatasetDir, shard: int) -> list[str]:
    """The keys of a shard's selected rows."""
    keys: list[str] = read_parquet(dataset.selection(shard), ["key"])["key"].to_pylist()
    return keys


def _check_reached(done: Finished, recipe: ImageRecipe) -> None:
    if done.num_fetched >= _MIN_ROWS_TO_TELL and done.num_unreached == done.num_fetched:
        if recipe.source:
            raise UserError(
                f"None of the {done.num_fetched:,} images of shard {done.shard:05d} is in {recipe.source.path} now. Is "
                "it mounted? The shard is not recorded; run the same command again when it is."
            )
        raise UserError(
            f"Nothing could be reached: of the {done.num_fetched:,} rows of shard {done.shard:05d}, every one failed "
            "because no name was found, nobody answered, or the proxy failed. Is the network up, and the name server"
            f"{', and the proxy' if recipe.download.proxy else ''}? {_unused_proxies(recipe)}The shard is not "
            "recorded; run the same command again when they are."
        )


def _unused_proxies(recipe: ImageRecipe) -> str:
    """Says that the environment's proxies are not used, if it has any."""
    names = environment_variables()
    if recipe.download.proxy or recipe.source or not names:
        return ""
    return f"{', '.join(names)} of the environment serve downloads only with download.proxy: environment. "


def _needs(recipe: ImageRecipe) -> Openers:
    """Checks of the settings that name something outside the recipe."""
    config, openers = recipe.download, Openers()
    if config.proxy or _unused_proxies(recipe):
        openers["download.proxy"] = lambda: _unused_proxies(recipe).strip() or str(Proxies(config.proxy))
    if config.ca_file:
        openers["download.ca_file"] = partial(_num_authorities, config.ca_file)
    return openers


def _num_authorities(ca_file: str) -> str:
    from sdtrain.download.http.connections import tls_context  # with the web client, slow to import

    return f"{len(tls_context(ca_file).get_ca_certs())} authorities trusted"


def _rules(recipe: ImageRecipe) -> dict[str, object]:
    return {}


def _stats(dataset: DatasetDir, shard: int) -> list[Path]:
    return [dataset.images_stats(shard)]


def _drop(dataset: DatasetDir, recipe: ImageRecipe, shard: int, removed: Removed) -> None:
    is_finished = shard in removed.finished.get("download", ())
    drop_images(dataset, shard, removed.uids, download_fingerprint(dataset, recipe, shard) if is_finished else None)


def _recount(dataset: DatasetDir, entry: ShardReport, tables: Sequence[Path]) -> ShardReport:
    kept = {"fingerprint": entry.fingerprint, "seconds": entry.seconds, "finished_at": entry.finished_at}
    return report_images(dataset, entry.shard).model_copy(update=kept)


DOWNLOAD: Stage[ImageRecipe] = Stage(
    *("download", _shards, download_fingerprint, _run),
    is_on=always_on,
    inputs={"select": "all shards"},
    planned_by=None,
    num_shards=num_selected_shards,
    beside=_stats,
    table=Table(
        view="images",
        comment="One row for every selected row: the image as img2dataset stored it, or the reason it is not there",
        columns={
            **dict.fromkeys(("url", "caption", "uid", "key", "status", "error_message"), "VARCHAR"),
            **dict.fromkeys(("width", "height", "original_width", "original_height"), "INTEGER"),
            **dict.fromkeys(("exif", "sha256", "reason", "size_in_metadata"), "VARCHAR"),
            "phash": "BIGINT",
            "extension": "VARCHAR",
            **dict.fromkeys(("picture_offset", "picture_bytes"), "BIGINT"),
            "shard": "INTEGER",
            "tar": "VARCHAR",
        },
        path=DatasetDir.images_table,
        rewriting=Rewriting(origins={}, has_tar=True, drop=_drop, recount=_recount),
    ),
    drops=Drops(repeats=False, rules=_rules, last={}, explain=meaning_of),
    uses_gpu=False,
    needs=Needs(files=_needs, networks=no_openers, sized=no_openers),
    work=WORK["download"],
)
