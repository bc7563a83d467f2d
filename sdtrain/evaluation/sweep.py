"""Plans the steps of an evaluation and computes its results from their output."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast

from sdtrain.dataset.stage import Stage
from sdtrain.errors import UserError
from sdtrain.evaluation.clean_numbers import CleanNumbers
from sdtrain.evaluation.contamination import TrainingSearch, contamination_notes
from sdtrain.evaluation.distances import Gaussian
from sdtrain.evaluation.further import FurtherNumbers
from sdtrain.evaluation.layout import EvaluationDir, key_of, read_tensors, tensor_names, write_json
from sdtrain.evaluation.metric import Arrays, Metric
from sdtrain.evaluation.metrics import ImageArrays, arrays_needed, axes_of, descriptions, numbers, open_metrics
from sdtrain.evaluation.models import EvaluatedModel, identify_all, run_of
from sdtrain.evaluation.networks import agreement_digest, check_networks, features_digest
from sdtrain.evaluation.preference import check_preference, preference_digest
from sdtrain.evaluation.prompts import Prompts, choose_prompts
from sdtrain.evaluation.protocol import Protocol
from sdtrain.evaluation.reference import (
    Reference,
    ReferenceJob,
    open_reference,
    prepare_reference,
    reference_parts,
    reference_stage,
)
from sdtrain.evaluation.results import Axis, Results, choose_axes, write_results
from sdtrain.evaluation.stages import SampleJob, caption_stage, context_stage, draw_stage, feature_stage
from sdtrain.formats.any_model import resolve_checkpoint
from sdtrain.precision import Fixed, decoder_dtype, resolve, torch_dtype
from sdtrain.preflight.checks import Check, check_room, check_writable
from sdtrain.redaction import as_recorded

_IMAGE_BYTES_PER_PIXEL = 2.0
"""Roughly, for a PNG of a photograph."""


class Step(NamedTuple):
    """A stage, its output directory and its input."""

    stage: Stage[Any]
    directory: EvaluationDir
    job: Any


@dataclass(frozen=True)
class Sweep:
    """A planned evaluation; `real` has directory and input of each network's reference stage, none for statistics.

    `training` looks for its prompts and reference images in the models' training data, and `following` measures how
    images follow other prompts; None: nobody does.
    """

    protocol: Protocol
    directory: EvaluationDir
    models: tuple[EvaluatedModel, ...]
    prompts: Prompts
    reference: Reference
    real: tuple[tuple[EvaluationDir, ReferenceJob], ...]
    axes: tuple[Axis | None, Axis]
    training: TrainingSearch | None = None
    following: FurtherNumbers | None = None

    def steps(self) -> list[Step]:
        """The steps in order; each skips finished parts."""
        drawings = [SampleJob(self.protocol, model, self.prompts.digest) for model in self.models]
        by_text_encoder = {drawing.model.text_encoder: drawing for drawing in reversed(drawings)}
        steps = [Step(reference_stage(job), directory, job) for directory, job in self.real]
        steps += [self._step(context_stage, drawing) for drawing in by_text_encoder.values()]
        steps += [self._step(caption_stage, drawings[0])] if self._needs_captions else []
        steps += self.training.steps() if self.training else []
        for drawing in drawings:
            for scale in self.protocol.scales:
                at_scale = replace(drawing, scale=scale)
                of_networks = [replace(at_scale, network=network) for network in self._networks]
                steps += [self._step(draw_stage, at_scale), *(self._step(feature_stage, job) for job in of_networks)]
        return steps + (self.following.steps() if self.following else [])

    def checks(self) -> list[Check]:
        """Checks of networks and output, unless all images are measured, and those of `following`."""
        further, left = self.following.checks() if self.following else [], self._num_pending()
        if not left:
            return further
        num_bytes = left * _IMAGE_BYTES_PER_PIXEL * self.models[0].size_px ** 2
        return [
            Check("output", lambda: check_writable(self.directory.root)),
            Check("disk", lambda: check_room(self.directory.root, num_bytes, "The images")),
            Check("networks", lambda: check_networks(self.protocol)),
            *([Check("preference", partial(check_preference, named))] if (named := self.protocol.preference) else []),
            *(self.training.checks() if self.training else []),
            *further,
        ]

    @property
    def _networks(self) -> list[str]:
        """Whose features have a file of their own: the first's, which goes without a name, and further ones'."""
        return ["", *self.protocol.networks[1:]]

    def _num_pending(self) -> int:
        scales, parts = [key_of(scale) for scale in self.protocol.scales], self.protocol.parts
        return sum(
            len(self.protocol.indices(part))
            for model, scale, part in itertools.product(self.models, scales, parts)
            if not all(self.directory.features(model.key, scale, part, name).exists() for name in self._networks)
        )

    def finish(self) -> Results:
        """Computes and writes numbers and plot, once every step is finished."""
        real = self._real_images()
        metrics, captions = open_metrics(self.protocol, real), {}
        if self._needs_captions:
            captions = _arrays([self.directory.captions(part) for part in self.protocol.parts])
        found = self.training.found() if self.training else {}
        rows = []
        for model in self.models:
            clean = CleanNumbers(self.protocol, real, found[model.label]) if model.label in found else None
            rows += self._rows(model, metrics, captions, clean)
        notes = [remark for metric in metrics for remark in metric.remarks()] + self._truncated_prompts(captions)
        notes += contamination_notes(found, self.training) if self.training else []
        notes += self.following.notes() if self.following else []
        results = Results(
            protocol=self._described(),
            metrics=descriptions(metrics) | dict(self.following.metrics if self.following else {}),
            notes=notes,
            rows=rows,
            skills=self.following.skills() if self.following else [],
            contamination={model: each.record for model, each in found.items()},
        )
        write_results(self.directory, results, *self.axes)
        return results

    def _rows(
        self, model: EvaluatedModel, metrics: Sequence[Metric], captions: Arrays, clean: CleanNumbers | None
    ) -> list[dict[str, Any]]:
        """The numbers of a model at each scale, with those without what its training data holds."""
        rows = []
        for scale in self.protocol.scales:
            drawn = self._drawn_images(model, scale)
            row = {"model": model.label, "guidance_scale": scale, "num_images": self.protocol.num_prompts}
            row |= numbers(metrics, drawn, captions)
            row |= self.following.numbers(model, scale) if self.following else {}
            if clean:
                row |= clean.row(metrics, row, drawn, captions)
                row |= clean.further_row(self.following, model, scale) if self.following else {}
            rows.append(row)
        return rows

    def _drawn_images(self, model: EvaluatedModel, scale: float) -> ImageArrays:
        parts, key = self.protocol.parts, key_of(scale)
        files = [[self.directory.features(model.key, key, part, name) for part in parts] for name in self._networks]
        return self._image_arrays(files)

    def _image_arrays(self, files: Sequence[list[Path]]) -> ImageArrays:
        """The arrays in each network's files, in the protocol's order."""
        first, *further = (_arrays(paths) for paths in files)
        features = [arrays["features"] for arrays in (first, *further)]
        return ImageArrays(dict(zip(self.protocol.networks, features, strict=True)), first)

    @property
    def _needs_captions(self) -> bool:
        return bool(arrays_needed(self.protocol, "captions"))

    def _step(self, stage: Any, drawing: SampleJob) -> Step:
        return Step(stage(drawing), self.directory, drawing)

    def _real_images(self) -> ImageArrays | Gaussian:
        if self.reference.statistics is not None:
            return self.reference.statistics
        return self._image_arrays(
            [[folder.reference(part) for part in reference_parts(job)] for folder, job in self.real]
        )

    def _truncated_prompts(self, captions: dict[str, Any]) -> list[str]:
        truncated = {f"the text encoder of {model.label}": self._num_truncated(model) for model in self.models}
        if captions:
            truncated[f"CLIP {self.protocol.clip_model}"] = int(captions["cut"].sum())
        example = next((found for model in self.models if (found := self._example(model))), "")
        return [
            f"{num:,} prompts are longer than {who} reads and were truncated{example}."
            for who, num in truncated.items()
            if num
        ]

    def _num_truncated(self, model: EvaluatedModel) -> int:
        paths = [self.directory.contexts(model.text_encoder[:12], part) for part in self.protocol.parts]
        return int(read_tensors(paths, ["cut"])["cut"].sum())

    def _example(self, model: EvaluatedModel) -> str:
        """What the first truncated prompt lacks, in words; empty if none is, or parts are from before it was kept."""
        for part in self.protocol.parts:
            path = self.directory.contexts(model.text_encoder[:12], part)
            cut = read_tensors([path], ["cut"])["cut"].tolist()
            if any(cut) and "cut_at" in tensor_names(path):
                place = cut.index(True)
                start = int(read_tensors([path], ["cut_at"])["cut_at"][place])
                prompt = self.prompts.texts[self.protocol.indices(part)[place]]
                return f"; the first lacks “{prompt[start:].strip()}”"
        return ""

    def _described(self) -> dict[str, Any]:
        further = self.following.described() if self.following else {}
        return (
            as_recorded(self.protocol.model_dump(mode="json"))
            | further
            | {
                "size_px": self.models[0].size_px,
                "prompts_source": self.prompts.source,
                "prompts_sha256": self.prompts.digest,
                "reference_source": self.reference.source,
                "reference_sha256": self.reference.digest,
                "networks_sha256": {name: features_digest(self.protocol, name) for name in self.protocol.networks},
                "agreement_by": agreement_digest(self.protocol),
                "preference_sha256": preference_digest(preference)
                if (preference := self.protocol.preference)
                else None,
                "models": {model.label: model.digest for model in self.models},
            }
        )


def plan(
    protocol: Protocol,
    models: Sequence[Path],
    output: Path | None = None,
    x: str | None = None,
    y: str | None = None,
    further: Mapping[str, Axis] = MappingProxyType({}),
) -> Sweep:
    """Checks everything that can be checked before the first image is drawn.

    The default `output` is `evaluation` in the run if the only model is one. `x` and `y` are the plot's columns;
    `further` are those of `FurtherNumbers` that will be measured too. UserError if something is missing, or does not
    match.
    """
    directory = EvaluationDir(_output(models, output).absolute())
    protocol = protocol.model_copy(update={"dtype": _dtype(protocol, directory)})
    protocol = protocol.model_copy(update={"vae_dtype": _vae_dtype(protocol, directory)})
    prompts = choose_prompts(Path(protocol.prompts), protocol.num_prompts, protocol.prompt_seed)
    for network in protocol.networks:  # checks that the weights exist
        features_digest(protocol, network)
    agreement_digest(protocol)
    if protocol.preference is not None:
        preference_digest(protocol.preference)
    # Pins one checkpoint of a run that still trains: all parts must use the weights that the results name.
    found = identify_all([resolve_checkpoint(path.absolute()) for path in models], protocol)
    reference = open_reference(protocol.reference, protocol.num_reference)
    axes = choose_axes(axes_of(protocol, reference.statistics is None) | dict(further), x, y)
    if reference.statistics is not None:
        open_metrics(protocol, reference.statistics)
    write_json(directory.prompts, list(prompts.texts))
    write_json(directory.protocol, as_recorded(protocol.model_dump(mode="json")))
    compared = [] if reference.statistics else protocol.networks
    real = [prepare_reference(reference, protocol, found[0].size_px, network) for network in compared]
    return Sweep(protocol, directory, tuple(found), prompts, reference, tuple(real), axes)


def _dtype(protocol: Protocol, directory: EvaluationDir) -> Fixed:
    """The precision; for `auto` the one this evaluation started with, perhaps on another machine."""
    if protocol.dtype == "auto" and (before := _protocol_before(directory)) is not None:
        return cast(Fixed, before["dtype"])
    return resolve(protocol.dtype)


def _vae_dtype(protocol: Protocol, directory: EvaluationDir) -> Literal["fp32", "bf16"]:
    """The VAE's precision, likewise; evaluations from before there was a choice are in fp32."""
    if protocol.vae_dtype != "auto":
        return protocol.vae_dtype
    if (before := _protocol_before(directory)) is not None:
        return cast(Literal["fp32", "bf16"], before.get("vae_dtype", "fp32"))
    return "bf16" if decoder_dtype(torch_dtype(protocol.dtype)) is torch_dtype("bf16") else "fp32"


def _protocol_before(directory: EvaluationDir) -> dict[str, Any] | None:
    """What an evaluation in `directory` was begun with."""
    for file, protocol_in in ((directory.protocol, lambda it: it), (directory.results, lambda it: it["protocol"])):
        if file.exists():
            return dict(protocol_in(json.loads(file.read_text())))
    return None


def _output(models: Sequence[Path], output: Path | None) -> Path:
    if output is not None:
        return output
    run = run_of(models[0]) if len(models) == 1 else None
    if run is None:
        raise UserError("Say with --output where the evaluation goes; only a single run keeps it in its own folder.")
    return run / "evaluation"


def _arrays(paths: list[Path]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in read_tensors(paths).items()}
