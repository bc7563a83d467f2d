"""ASK: decoded images -> the probability of yes for each question that a rule in words asks."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from filters.ask_rules import COLUMN
from filters.caption_config import AskConfig
from filters.recipe import Recipe
from sdtrain.dataset.files import publish, read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, num_selected_shards, read_entry, require_entry, selected_shards
from sdtrain.dataset.rewriting import IN_TABLE
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import Needs, Openers, Stage, Table, no_openers, nothing_beside
from sdtrain.dataset.sync import fetch_if_stored
from sdtrain.dataset.work import WORK
from sdtrain.endpoint.answer_log import AnswerLog, clear_finished
from sdtrain.endpoint.answers import Answer
from sdtrain.endpoint.ask import check_endpoint
from sdtrain.endpoint.config import EndpointConfig
from sdtrain.endpoint.images import Questions, ask_about_images, pixels_of

_log = logging.getLogger(__name__)
_SCHEMA = pa.schema([("uid", pa.string()), (COLUMN, pa.map_(pa.string(), pa.float32())), ("pixels", pa.uint64())])
_FORM_OF_ANSWER = "{question} Answer with one word, yes or no."
_MAX_TOKENS, _TOP_LOGPROBS = 8, 20
_MADE_BY = b"sdtrain.ask.by"
"""In a table's metadata: by whom its questions were answered; `pixels` of an image say whether it is still the same."""
Chances = dict[str, dict[str, float | None]]
"""uid -> question -> probability of yes; None if the answer is neither yes nor no."""


def ask_shard(dataset: DatasetDir, recipe: Recipe, shard: int) -> ShardReport:
    """Writes the answers about one shard's decoded images; questions that it has answers to are not asked again.

    UserError if the server cannot be used, or the budget is spent; the answers until then are kept.
    """
    config, questions = recipe.asked, recipe.questions
    uids, pixels = _decoded(dataset, shard), pixels_of(dataset, shard)
    known = _known(dataset, shard, config, pixels)
    chances = _ask(dataset, recipe, shard, uids, known)
    rows: list[dict[str, Any]] = [
        {"uid": uid, COLUMN: list(chances[uid].items()), "pixels": pixels[uid]} for uid in uids.values()
    ]
    unknown = sum(chance is None for each in chances.values() for chance in each.values())
    with publish(dataset.answers_table(shard)) as temporary:
        table = pa.Table.from_pylist(rows, _SCHEMA.with_metadata({_MADE_BY: _made_by(config).encode()}))
        pq.write_table(table, temporary, compression="zstd")
    notes = [f"{unknown:,} of {len(rows) * len(questions):,} answers are neither yes nor no"] if unknown else []
    outputs = describe_outputs(dataset, [dataset.answers_table(shard)])
    counts = {"num_in": len(uids), "num_out": len(uids)}
    return ShardReport(stage="ask", shard=shard, **counts, outputs=outputs, notes=notes)


def _ask(dataset: DatasetDir, recipe: Recipe, shard: int, uids: Mapping[str, str], known: Chances) -> Chances:
    """All answers: those that are known, and those of the server to the rest."""
    config, texts = recipe.asked, recipe.questions
    answers = {uid: {text: known[uid][text] for text in texts if text in known.get(uid, {})} for uid in uids.values()}
    asked = {text: _FORM_OF_ANSWER.format(question=text) for text in texts}
    questions = Questions(asked, _MAX_TOKENS, config.image_px, _TOP_LOGPROBS)
    with AnswerLog(dataset.answers_log(shard), _made_of(dataset, config, shard)) as log:
        for uid, has in answers.items():
            for text in has:
                log.know(uid, text, Answer("text"))
        ask_about_images(dataset, shard, uids, questions, _server(config), _setting(recipe), log)
        return {
            uid: {text: has[text] if text in has else _chance(log[uid, text]) for text in texts}
            for uid, has in answers.items()
        }


def _chance(answer: Answer) -> float | None:
    # The first word is what counts: an answer that goes on and is cut off has said it.
    return answer.probability_of_yes() if answer.kind in ("text", "too_long") else None


def _known(dataset: DatasetDir, shard: int, config: AskConfig, pixels: Mapping[str, int | None]) -> Chances:
    """The answers of the shard's former table that the same network gave about the same pixels."""
    path = dataset.answers_table(shard)
    fetch_if_stored(dataset, path)
    if not path.exists() or (pq.read_schema(path).metadata or {}).get(_MADE_BY) != _made_by(config).encode():
        return {}
    rows = read_parquet(path).to_pylist()
    return {
        row["uid"]: dict(row[COLUMN])
        for row in rows
        if row["pixels"] is not None and pixels.get(row["uid"]) == row["pixels"]
    }


def _described(config: AskConfig) -> dict[str, Any]:
    return {"endpoint": _server(config).described(), "image_px": config.image_px, "form": _FORM_OF_ANSWER}


def _made_by(config: AskConfig) -> str:
    return json.dumps(_described(config))


def _made_of(dataset: DatasetDir, config: AskConfig, shard: int) -> str:
    images = fingerprint("images", {}, [require_entry(dataset, "download", shard)])
    return json.dumps(_described(config) | {"images": images})


def _decoded(dataset: DatasetDir, shard: int) -> dict[str, str]:
    """Key -> uid of the images that SCORE could decode, in the order of their keys."""
    rows = read_parquet(dataset.scores(shard), ["key", "uid", "reason"])
    rows = rows.filter(pc.is_null(rows["reason"])).sort_by("key")
    return dict(zip(rows["key"].to_pylist(), rows["uid"].to_pylist(), strict=True))


def _server(config: AskConfig) -> EndpointConfig:
    if config.endpoint is None:
        raise AssertionError("the recipe refuses a rule that nobody answers")
    return config.endpoint


def _setting(recipe: Recipe) -> str:
    """Where the recipe names the server."""
    return "ask.endpoint" if recipe.ask.endpoint else "caption.endpoint"


def _is_on(recipe: Recipe) -> bool:
    return bool(recipe.questions)


def _shards(dataset: DatasetDir, recipe: Recipe) -> list[int]:
    return list(selected_shards(dataset))


def _fingerprint(dataset: DatasetDir, recipe: Recipe, shard: int) -> str:
    # The questions, but no thresholds: these are DECIDE's.
    config = {"questions": recipe.questions, "made_of": _made_of(dataset, recipe.asked, shard)}
    return fingerprint("ask/1", config, [require_entry(dataset, stage, shard) for stage in ("download", "score")])


def _run(dataset: DatasetDir, recipe: Recipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    logs = dataset.answers_log(0).parent.glob("*.jsonl")
    clear_finished(logs, lambda shard: read_entry(dataset, "ask", shard) is not None)
    num_images = sum(require_entry(dataset, "score", shard).num_out for shard in shards)
    _log.warning("ask: %s", _say_requests(recipe, num_images))
    fetch_if_stored(dataset, *map(dataset.answers_table, shards))  # with answers to other questions
    for shard in shards:
        yield ask_shard(dataset, recipe, shard)
        dataset.answers_log(shard).unlink(missing_ok=True)


def _files(recipe: Recipe) -> Openers:
    return {_setting(recipe): partial(check_endpoint, _server(recipe.asked), _setting(recipe))}


def _sized(recipe: Recipe, num_rows: int) -> Openers:
    return {_setting(recipe): partial(_say_requests, recipe, num_rows)}


def _say_requests(recipe: Recipe, num_images: int) -> str:
    num, url = len(recipe.questions), _server(recipe.asked).url
    return f"up to {num_images * num:,} requests to {url}, {num} about each image, which is sent there"


ASK: Stage[Recipe] = Stage(
    *("ask", _shards, _fingerprint, _run),
    is_on=_is_on,
    inputs=dict.fromkeys(("download", "score"), "same shard"),
    planned_by=None,
    num_shards=num_selected_shards,
    beside=nothing_beside,
    table=Table(
        view="answers",
        comment="For every image the probability of yes for each question that the rule `ask` names",
        columns={"uid": "VARCHAR", COLUMN: "MAP(VARCHAR, FLOAT)", "pixels": "UBIGINT", "shard": "INTEGER"},
        path=DatasetDir.answers_table,
        rewriting=IN_TABLE,
    ),
    drops=None,
    uses_gpu=False,
    needs=Needs(files=_files, networks=no_openers, sized=_sized),
    work=WORK["ask"],
)
