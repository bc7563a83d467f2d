"""Execution of a removal: journaled first, then carried out by any number of runs."""

from __future__ import annotations

import logging

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ValidationError

from filters import pipeline
from filters.caption.duplicates import forget_duplicate_texts
from filters.recipe import Recipe
from filters.recipe_record import read_recipe
from filters.remove.plan import Removal
from filters.remove.positions import record_rewritten, record_rows
from filters.remove.rewrite import StageRewrite, touched_entries
from sdtrain.dataset.files import publish, scratch_path, sha256_of
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import bulk_reads, entries, write_entry
from sdtrain.dataset.removal_ledger import REMOVED, key_digest, read_ledger, write_ledger
from sdtrain.dataset.shard_report import ShardReport, StageName
from sdtrain.dataset.stage import clear_leftovers, is_finished
from sdtrain.dataset.sync import discard, evict_finished, fetch_outputs, push_files
from sdtrain.dataset.tables.connection import connected
from sdtrain.endpoint.answer_log import forget_images
from sdtrain.errors import UserError
from sdtrain.pack.plan import forget_plan

_log = logging.getLogger(__name__)


class Journal(BaseModel):
    """A removal in progress.

    Attributes:
        number: of earlier removals.
        note: a sentence that describes it.
        ledger_sha256: of the ledger written with it; if the ledger differs, the removal has not begun.
        touched: by stage, the shards whose files hold removed samples.
        finished: by stage, the shards that were finished before, and stay so.
        notes: sentences on what could not be kept finished.
    """

    number: int
    note: str
    num_samples: int
    ledger_sha256: str
    touched: dict[StageName, list[int]]
    finished: dict[StageName, list[int]]
    notes: list[str] = []


def start_removal(dataset: DatasetDir, removal: Removal) -> None:
    """Writes the journal and blocks the samples; `finish_removal` does the rest.

    Call `finish_removal` first if an earlier removal may have been interrupted.
    """
    if dataset.removal.exists():
        raise AssertionError(f"{dataset.removal}: this would forget a removal that is under way")
    ledger = pa.concat_tables([read_ledger(dataset.removed), removal.rows])
    finished, notes = _finished_shards(dataset, read_recipe(dataset))
    number = len(entries(dataset, "remove"))
    record_rows(dataset, removal, number)
    with publish(dataset.removal) as temporary:
        # Under the journal's temporary name first, because the journal holds its digest.
        write_ledger(temporary, ledger)
        digest = sha256_of(temporary)
        journal = Journal(
            number=number,
            note=removal.sentences()[0],
            num_samples=removal.num_samples,
            ledger_sha256=digest,
            touched=removal.touched,
            finished=finished,
            notes=notes,
        )
        temporary.write_text(journal.model_dump_json(indent=1) + "\n")
    push_files(dataset, dataset.removal)
    write_ledger(dataset.removed, ledger)
    push_files(dataset, dataset.removed)


def finish_removal(dataset: DatasetDir) -> list[str]:
    """Carries out the journaled removal, if any; returns sentences on what was done.

    UserError if a file to rewrite is damaged, or removal.json cannot be read.
    """
    journal = _read_journal(dataset)
    if journal is None:
        return []
    recipe = read_recipe(dataset)
    for stage in pipeline.STAGES:
        touched = touched_entries(dataset, stage, journal.touched.get(stage.name, []))
        # As they are: an earlier run may have replaced some of them already.
        fetch_outputs(dataset, stage.name, [entry.shard for entry, _ in touched], as_they_are=True)
    with connected(spill=scratch_path(dataset.root, "remove")) as connection:
        rewrite = StageRewrite(dataset, recipe, connection, journal.touched, journal.finished)
        for stage in pipeline.STAGES:
            rewrite.rewrite(stage)
            rewrite.restamp(stage)
    record_rewritten(dataset, journal.number)
    _record(dataset, journal)
    _refresh(dataset, recipe)
    discard(dataset, dataset.removal)
    evict_finished(dataset)
    return [f"Removed: {journal.note}.", *journal.notes]


def finish_interrupted_removal(dataset: DatasetDir) -> None:
    """Call before changing a locked dataset's recipe, because the files follow the previous recipe."""
    if dataset.removal.exists():
        _log.warning("A removal had been interrupted. %s", " ".join(finish_removal(dataset)))


def _record(dataset: DatasetDir, journal: Journal) -> None:
    count, notes = journal.num_samples, [journal.note, *journal.notes]
    counts = {"num_in": count, "num_out": 0, "dropped": {REMOVED: count} if count else {}}
    entry = {"stage": "remove", "shard": journal.number, "notes": notes}
    write_entry(dataset, ShardReport.model_validate(entry | counts))


def _read_journal(dataset: DatasetDir) -> Journal | None:
    if not dataset.removal.exists():
        return None
    try:
        journal = Journal.model_validate_json(dataset.removal.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{dataset.removal}, the plan of a removal that was interrupted, cannot be read. Delete it, and run the "
            "removal again."
        ) from error
    if dataset.removed.exists() and sha256_of(dataset.removed) == journal.ledger_sha256:
        return journal
    discard(dataset, dataset.removal)  # killed before anything was blocked or touched: it never began
    return None


def _finished_shards(dataset: DatasetDir, recipe: Recipe) -> tuple[dict[str, list[int]], list[str]]:
    """Returns finished shards by stage, and why some stages could not be checked."""
    found: dict[str, list[int]] = {}
    notes = []
    for stage in pipeline.STAGES:
        recorded = set(entries(dataset, stage.name).shards.tolist())
        try:
            shards = [s for s in stage.shards(dataset, recipe) if s in recorded] if recorded else []
            with bulk_reads():
                found[stage.name] = [s for s in shards if is_finished(stage, dataset, recipe, s)]
        except UserError as error:
            found[stage.name] = []
            notes.append(f"The next build does stage '{stage.name}' again, since it could not be checked here: {error}")
    return found, notes


def _refresh(dataset: DatasetDir, recipe: Recipe) -> None:
    """Rewrites outputs derived from all stages, and deletes leftovers of killed runs."""
    from filters.inspect.report import push_rest, report_on
    from filters.inspect.views import write_views
    from filters.search.index import forget_index
    from sdtrain.pack.stage import write_index

    forget_plan(dataset)
    forget_duplicate_texts(dataset)
    _forget_answers(dataset)
    forget_index(dataset)
    for stage in pipeline.STAGES:
        clear_leftovers(stage, dataset)
    if entries(dataset, "pack"):
        write_index(dataset)
    write_views(dataset, recipe)
    if dataset.report.exists():
        report_on(dataset, recipe)
    push_rest(dataset)


def _forget_answers(dataset: DatasetDir) -> None:
    """Takes removed images out of the answers that unfinished shards keep."""
    ledger = read_ledger(dataset.removed)
    removed = set(ledger.filter(pc.equal(ledger["kind"], "uid"))["digest"].to_pylist())
    for path in sorted([*dataset.root.glob("captions/*.jsonl"), *dataset.root.glob("answers/*.jsonl")]):
        forget_images(path, lambda uid: key_digest("uid", uid) in removed)
