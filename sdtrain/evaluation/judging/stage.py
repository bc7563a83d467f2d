"""Asks the judge all questions about a model's images at one guidance scale, part by part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, require_entry
from sdtrain.dataset.progress import report_progress
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import Stage, plain_stage
from sdtrain.endpoint.answers import Answer
from sdtrain.endpoint.ask import ask
from sdtrain.endpoint.budget import Budget
from sdtrain.endpoint.config import EndpointConfig
from sdtrain.endpoint.messages import Request, jpeg_of
from sdtrain.errors import UserError
from sdtrain.evaluation.judging.answer_log import AnswerLog, request_digest
from sdtrain.evaluation.judging.questions import JudgedPrompt, Question, questions_digest, read_judged
from sdtrain.evaluation.layout import EvaluationDir, key_of
from sdtrain.evaluation.stages import SampleJob, draw_stage, read_images

SETTING = "judge"
TOP_LOGPROBS = 20
"""Candidates for an answer's first token whose probabilities are asked for: the most that servers give by default."""
_MAX_TOKENS = 4
"""Of an answer; a judge without logprobs is judged by the word itself, which may be of several tokens."""
_SCHEMA = pa.schema(
    [
        ("image", pa.int32()),
        ("question", pa.int32()),
        *((name, pa.string()) for name in ("kind", "text", "model")),
        ("probability", pa.float64()),
        ("is_soft", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class JudgeJob:
    """The input of the stage: the drawing of the images, the questions' digest and the judge."""

    drawing: SampleJob
    questions: str
    judge: EndpointConfig

    def path(self, directory: DatasetDir, part: int) -> Path:
        """The table of answers, a row for each question: NaN is the probability of one without an answer."""
        folder = directory.root / "answers" / self.drawing.model.key / key_of(self.drawing.scale)
        return folder / f"{part:05d}.parquet"


class _Asked(NamedTuple):
    image: int
    number: int
    question: Question
    request: Request
    digest: str


def questions_path(directory: DatasetDir) -> Path:
    """The questions as this evaluation keeps them."""
    return directory.root / "questions.json"


def judge_stage(job: JudgeJob) -> Stage[JudgeJob]:
    """The stage that asks about each part's images."""
    drawing = job.drawing
    return plain_stage(f"judge-{drawing.model.key}-{key_of(drawing.scale)}", _parts, _fingerprint, _run)


def part_questions(directory: DatasetDir, job: JudgeJob, part: int) -> list[JudgedPrompt]:
    """The prompts of a part with their questions."""
    prompts = read_judged(questions_path(directory), job.questions)
    return [prompts[number] for number in job.drawing.protocol.indices(part)]


def _parts(dataset: DatasetDir, job: JudgeJob) -> list[int]:
    return job.drawing.protocol.parts


def _fingerprint(dataset: DatasetDir, job: JudgeJob, part: int) -> str:
    asked = questions_digest(part_questions(dataset, job, part))
    drawn = require_entry(dataset, draw_stage(job.drawing).name, part)
    return fingerprint("judge/1", [asked, job.judge.described(), _MAX_TOKENS, TOP_LOGPROBS], inputs=[drawn])


def _run(dataset: DatasetDir, job: JudgeJob, parts: Sequence[int]) -> Iterator[ShardReport]:
    for part in parts:
        path = job.path(dataset, part)
        with AnswerLog(path.with_suffix(".jsonl")) as log:
            rows = _answered(dataset, job, part, log)
        with publish(path) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), temporary, compression="zstd")
        outputs = describe_outputs(dataset, [path])
        yield ShardReport(stage=judge_stage(job).name, shard=part, num_in=len(rows), num_out=len(rows), outputs=outputs)


def _answered(dataset: DatasetDir, job: JudgeJob, part: int, log: AnswerLog) -> list[dict[str, object]]:
    """A row for each question, asking those that the log has no answer to; UserError if some have none in the end."""
    all_asked = list(_asked(dataset, job, part))
    missing = list({asked.digest: asked for asked in all_asked if asked.digest not in log}.values())
    name = f"judge, guidance {job.drawing.scale:g}, part {part}"
    requests = (asked.request for asked in report_progress(missing, name, len(missing), "questions"))
    if missing:
        budget = Budget(job.judge, dataset.root / "spent")
        ask(job.judge, requests, SETTING, budget, lambda number, answer: log.add(missing[number].digest, answer))
    failed = [log[asked.digest] for asked in all_asked if log[asked.digest].kind == "failed"]
    if failed:
        raise UserError(
            f"The judge gave no answer to {len(failed):,} of {len(all_asked):,} questions ({failed[0].detail}). The "
            "others are kept: run the same command to ask these again."
        )
    return [_row(asked, log[asked.digest]) for asked in all_asked]


def _asked(dataset: DatasetDir, job: JudgeJob, part: int) -> Iterator[_Asked]:
    drawing, judge = job.drawing, job.judge.described()
    images, _ = read_images(EvaluationDir(dataset.root).samples(drawing.model.key, key_of(drawing.scale), part))
    prompts = part_questions(dataset, job, part)
    for index, image, prompt in zip(drawing.protocol.indices(part), images, prompts, strict=True):
        jpeg = jpeg_of(image, max(image.size))
        for number, question in enumerate(prompt.questions):
            request = Request(question.text, (jpeg,), _MAX_TOKENS, TOP_LOGPROBS)
            yield _Asked(index, number, question, request, request_digest(judge, request))


def _row(asked: _Asked, answer: Answer) -> dict[str, object]:
    return {
        "image": asked.image,
        "question": asked.number,
        "kind": answer.kind,
        "text": answer.text,
        "model": answer.model,
        "probability": float("nan") if answer.kind == "rejected" else probability_of_right(answer, asked.question),
        "is_soft": bool(answer.first_token),
    }


def probability_of_right(answer: Answer, question: Question) -> float:
    """The judge's probability that its answer begins with a right word; without logprobs 1 or 0."""
    return min(1.0, sum(answer.probability_of(word) for word in question.answers))
