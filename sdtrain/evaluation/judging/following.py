"""Prompt following in a sweep: draws the images of GenEval 2's prompts at each guidance scale and asks a judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sdtrain.dataset.files import read_parquet
from sdtrain.endpoint.ask import check_endpoint
from sdtrain.endpoint.config import EndpointConfig
from sdtrain.evaluation.judging.questions import (
    ATOM,
    WHOLE,
    JudgedPrompt,
    questions_digest,
    read_questions,
)
from sdtrain.evaluation.judging.scores import METRICS, Judged, breakdown, scores
from sdtrain.evaluation.judging.stage import SETTING, TOP_LOGPROBS, JudgeJob, judge_stage, questions_path
from sdtrain.evaluation.layout import EvaluationDir, write_json
from sdtrain.evaluation.models import EvaluatedModel
from sdtrain.evaluation.prompts import digest_of
from sdtrain.evaluation.stages import SampleJob, context_stage, draw_stage
from sdtrain.evaluation.sweep import Step, Sweep
from sdtrain.preflight.checks import Check

_FOLDER = "following"


@dataclass(frozen=True)
class PromptFollowing:
    """The judged prompts of a sweep, in a folder of their own: `directory` is laid out as an evaluation's."""

    sweep: Sweep
    directory: EvaluationDir
    source: str
    prompts: tuple[JudgedPrompt, ...]
    judge: EndpointConfig
    metrics: dict[str, str] = field(default_factory=lambda: dict(METRICS))

    def checks(self) -> list[Check]:
        """The judge, unless all is answered."""
        parts = self._job(self.sweep.models[0], 1.0).drawing.protocol.parts
        jobs = [self._job(model, scale) for model in self.sweep.models for scale in self.sweep.protocol.scales]
        if all(job.path(self.directory, part).exists() for job in jobs for part in parts):
            return []
        return [Check(SETTING, lambda: check_endpoint(self.judge, SETTING))]

    def steps(self) -> list[Step]:
        """Embed the prompts, draw them and ask, for each model and scale."""
        steps, encoded = list[Step](), set[str]()
        for model in self.sweep.models:
            drawing = self._job(model, 1.0).drawing
            if model.text_encoder not in encoded:
                steps.append(Step(context_stage(drawing), self.directory, drawing))
                encoded.add(model.text_encoder)
            for scale in self.sweep.protocol.scales:
                job = self._job(model, scale)
                steps.append(Step(draw_stage(job.drawing), self.directory, job.drawing))
                steps.append(Step(judge_stage(job), self.directory, job))
        return steps

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompts' texts."""
        return tuple(prompt.prompt for prompt in self.prompts)

    def numbers(self, model: EvaluatedModel, scale: float, left_out: Collection[int] = ()) -> dict[str, float | None]:
        """The columns of a row, once every step is finished; without the prompts that are left out."""
        judged = self._judged(model, scale)
        return scores([image for number, image in enumerate(judged) if number not in left_out])

    def skills(self) -> list[dict[str, Any]]:
        """For each model and scale, rows by skill and by number of atoms."""
        return [
            {"model": model.label, "guidance_scale": scale} | row
            for model in self.sweep.models
            for scale in self.sweep.protocol.scales
            for row in breakdown(self._judged(model, scale))
        ]

    def described(self) -> dict[str, Any]:
        """What decides the numbers, for the protocol."""
        models = Counter(name for table in self._tables() for name in table["model"].to_pylist())
        return {
            "questions_source": self.source,
            "questions_sha256": questions_digest(self.prompts),
            "judge": self.judge.described() | {"reported": dict(sorted(models.items()))},
            "judge_prompts": [ATOM, WHOLE],
        }

    def notes(self) -> list[str]:
        """Caveats for readers of these numbers."""
        rows = pa.concat_tables(self._tables())
        is_soft, probabilities = np.asarray(rows["is_soft"]), np.asarray(rows["probability"])
        kinds = np.asarray(rows["kind"].to_pylist())
        caveats = {
            "were answered without probabilities of tokens, and count 1 or 0 by their word, as in TIFA": (
                ~is_soft & ~np.isnan(probabilities)
            ),
            f"have no right word among the judge's {TOP_LOGPROBS} likeliest, and count 0": (
                is_soft & (probabilities == 0)
            ),
            "were declined by the judge": kinds == "refused",
            "were rejected by the server, and count nowhere": kinds == "rejected",
        }
        said = [f"{which.sum():,} of {len(rows):,} questions {what}." for what, which in caveats.items() if which.any()]
        several = set(rows["model"].to_pylist())
        return [*said, f"The judge's server reported several models: {sorted(several)}."] if len(several) > 1 else said

    def _job(self, model: EvaluatedModel, scale: float) -> JudgeJob:
        protocol = self.sweep.protocol.model_copy(update={"num_prompts": len(self.prompts)})
        return JudgeJob(
            SampleJob(protocol, model, digest_of(self.texts), scale), questions_digest(self.prompts), self.judge
        )

    def _table(self, model: EvaluatedModel, scale: float) -> pa.Table:
        job = self._job(model, scale)
        return pa.concat_tables([read_parquet(job.path(self.directory, part)) for part in job.drawing.protocol.parts])

    def _tables(self) -> list[pa.Table]:
        return [self._table(model, scale) for model in self.sweep.models for scale in self.sweep.protocol.scales]

    def _judged(self, model: EvaluatedModel, scale: float) -> list[Judged]:
        table = self._table(model, scale)
        images, probabilities = np.asarray(table["image"]), np.asarray(table["probability"])
        ends = np.cumsum(np.bincount(images, minlength=len(self.prompts)))[:-1]
        return [Judged(*each) for each in zip(self.prompts, np.split(probabilities, ends), strict=True)]


def with_prompt_following(sweep: Sweep, questions: Path, judge: EndpointConfig) -> Sweep:
    """The sweep, with prompt following by the questions of a file; UserError if it has another form."""
    prompts = read_questions(questions)
    directory = EvaluationDir(sweep.directory.root / _FOLDER)
    write_json(directory.prompts, [prompt.prompt for prompt in prompts])
    write_json(questions_path(directory), [prompt.model_dump(mode="json") for prompt in prompts])
    num = sum(len(prompt.questions) for prompt in prompts)
    source = f"{questions.name}: {len(prompts):,} prompts, {num:,} questions"
    return replace(sweep, following=PromptFollowing(sweep, directory, source, prompts, judge))
