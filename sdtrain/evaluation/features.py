"""The stages that embed the prompts and extract the features of one model's images at one scale."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, require_entry
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import Stage, plain_stage
from sdtrain.dataset.tars import read_samples
from sdtrain.evaluation.generate import SampleJob, draw_stage, part_prompts
from sdtrain.evaluation.layout import EvaluationDir, key_of, write_tensors
from sdtrain.evaluation.metrics import arrays_needed
from sdtrain.evaluation.networks import (
    agreement_digest,
    embed_images,
    embed_texts,
    feature_config,
    features_of,
    stand_in,
)
from sdtrain.evaluation.prompts import digest_of
from sdtrain.evaluation.protocol import Protocol


def caption_stage(job: SampleJob) -> Stage[SampleJob]:
    """The stage that embeds the prompts of each part."""
    return plain_stage("captions", _parts, _caption_fingerprint, _embed_parts, uses_gpu=True)


def feature_stage(job: SampleJob) -> Stage[SampleJob]:
    """The stage that extracts the features of each part's images."""
    return plain_stage(
        f"look-{job.model.key}-{key_of(job.scale)}", _parts, _feature_fingerprint, _extract_parts, uses_gpu=True
    )


def _parts(dataset: DatasetDir, job: SampleJob) -> list[int]:
    return job.protocol.parts


def _caption_fingerprint(dataset: DatasetDir, job: SampleJob, part: int) -> str:
    prompts = digest_of(part_prompts(EvaluationDir(dataset.root), job, part))
    return fingerprint("captions/1", prompts, weights=[agreement_digest(job.protocol)])


def _embed_parts(dataset: DatasetDir, job: SampleJob, parts: Sequence[int]) -> Iterator[ShardReport]:
    directory = EvaluationDir(dataset.root)
    for part in parts:
        prompts, path = part_prompts(directory, job, part), directory.captions(part)
        embeddings, cut = embed_texts(prompts, job.protocol)
        write_tensors(path, {"clip": embeddings, "cut": cut})
        outputs = describe_outputs(dataset, [path])
        yield ShardReport(stage="captions", shard=part, num_in=len(prompts), num_out=len(prompts), outputs=outputs)


def _feature_fingerprint(dataset: DatasetDir, job: SampleJob, part: int) -> str:
    drawn = require_entry(dataset, draw_stage(job).name, part)
    return fingerprint("look/1", [*feature_config(job.protocol), agreement_digest(job.protocol)], inputs=[drawn])


def _extract_parts(dataset: DatasetDir, job: SampleJob, parts: Sequence[int]) -> Iterator[ShardReport]:
    directory, stage, protocol = EvaluationDir(dataset.root), feature_stage(job).name, job.protocol
    for part in parts:
        images, texts = read_images(directory.samples(job.model.key, key_of(job.scale), part))
        tensors = _arrays_of(images, texts, protocol)
        path = directory.features(job.model.key, key_of(job.scale), part)
        write_tensors(path, tensors)
        outputs = describe_outputs(dataset, [path])
        yield ShardReport(stage=stage, shard=part, num_in=len(images), num_out=len(images), outputs=outputs)


def _arrays_of(images: Sequence[Image.Image], texts: Sequence[str], protocol: Protocol) -> dict[str, Tensor]:
    make: dict[str, Callable[[], Tensor]] = {
        "features": lambda: features_of(images, protocol),
        "clip": lambda: embed_images(images, protocol),
        "shown": lambda: stand_in(protocol.agreement).score_images(images, texts),
    }
    return {name: make[name]() for name in sorted(arrays_needed(protocol, "drawn"))}


def read_images(tar: Path) -> tuple[list[Image.Image], list[str]]:
    """The images and prompts of a part; UserError if the tar is damaged."""
    samples = [members for _, members in read_samples(tar)]
    images = [Image.open(io.BytesIO(members["png"])).convert("RGB") for members in samples]
    return images, [members["txt"].decode() for members in samples]
