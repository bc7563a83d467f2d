"""The stages of an evaluation: embed the prompts, draw each model's images at each scale, extract their features."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, require_entry
from sdtrain.dataset.progress import report_progress
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import Stage, plain_stage
from sdtrain.dataset.tars import read_samples, write_samples
from sdtrain.errors import UserError
from sdtrain.evaluation.layout import EvaluationDir, key_of, read_tensors, read_texts, write_tensors
from sdtrain.evaluation.metrics import arrays_needed
from sdtrain.evaluation.models import EvaluatedModel
from sdtrain.evaluation.networks import (
    agreement_digest,
    embed_images,
    embed_texts,
    feature_config,
    features_of,
    stand_in,
)
from sdtrain.evaluation.preference import preference_digest, preference_scores
from sdtrain.evaluation.prompts import digest_of
from sdtrain.evaluation.protocol import Protocol
from sdtrain.models.device import claim_device
from sdtrain.models.text import tokenize, truncated_at
from sdtrain.models.timesteps import are_respaced
from sdtrain.precision import Fixed, resolve, torch_dtype
from sdtrain.sampling.sampler import Networks, Sampler, SampleSettings, load_networks

# Threads that draw parts take turns at the networks.
_ONE_AT_A_TIME = Lock()
_CONTEXT_BATCH = 64


@dataclass(frozen=True)
class SampleJob:
    """The input of one model's stages; those of prompts ignore `scale`. `prompts` is the digest of all.

    `network` is whose features are extracted; empty for the protocol's first, whose file holds CLIP's embeddings too.
    """

    protocol: Protocol
    model: EvaluatedModel
    prompts: str
    scale: float = 1.0
    network: str = ""


def context_stage(job: SampleJob) -> Stage[SampleJob]:
    """The stage that encodes the prompts of each part."""
    return plain_stage(
        f"contexts-{job.model.text_encoder[:12]}", _parts, _context_fingerprint, _encode_parts, uses_gpu=True
    )


def draw_stage(job: SampleJob) -> Stage[SampleJob]:
    """The stage that draws each part."""
    return plain_stage(
        f"draw-{job.model.key}-{key_of(job.scale)}", _parts, _draw_fingerprint, _draw_parts, uses_gpu=True
    )


def part_prompts(directory: EvaluationDir, job: Any, part: int) -> list[str]:
    """The prompts of a part; `job` has `prompts`, the digest of all, and `protocol`."""
    texts = read_texts(directory.prompts, job.prompts)
    return [texts[index] for index in job.protocol.indices(part)]


def _parts(dataset: DatasetDir, job: SampleJob) -> list[int]:
    return job.protocol.parts


def _context_fingerprint(dataset: DatasetDir, job: SampleJob, part: int) -> str:
    prompts = digest_of(part_prompts(EvaluationDir(dataset.root), job, part))
    return fingerprint("contexts/1", [job.protocol.dtype, prompts], weights=[job.model.text_encoder])


def _draw_fingerprint(dataset: DatasetDir, job: SampleJob, part: int) -> str:
    protocol = job.protocol
    config = {
        "prompts": digest_of(part_prompts(EvaluationDir(dataset.root), job, part)),
        "first_seed": protocol.seed + protocol.indices(part).start,
        "scale": job.scale,
        **protocol.model_dump(include={"num_steps", "sampler", "dtype", "batch_size"}),
    }
    if protocol.vae_dtype == "bf16":  # what was drawn before there was a choice stays
        config["vae_dtype"] = "bf16"
    if are_respaced(protocol.sampler, protocol.num_steps):
        config["timesteps"] = "spread"
    return fingerprint("draw/1", config, weights=[job.model.digest])


def _encode_parts(dataset: DatasetDir, job: SampleJob, parts: Sequence[int]) -> Iterator[ShardReport]:
    directory, stage = EvaluationDir(dataset.root), context_stage(job).name
    for part in parts:
        prompts = part_prompts(directory, job, part)
        path = directory.contexts(job.model.text_encoder[:12], part)
        with _ONE_AT_A_TIME, torch.inference_mode():
            networks = _networks(job)
            token_ids = tokenize(networks.tokenizer, ["", *prompts])
            batches = token_ids.to(networks.vae.device).split(_CONTEXT_BATCH)
            contexts = torch.cat([networks.text_encoder(batch).last_hidden_state.cpu() for batch in batches])
        tensors = {"token_ids": token_ids, "contexts": contexts.clone()}
        places = [truncated_at(networks.tokenizer, prompt) for prompt in prompts]
        tensors["cut"] = torch.tensor([place is not None for place in places])
        tensors["cut_at"] = torch.tensor([place or 0 for place in places])
        write_tensors(path, tensors)
        outputs = describe_outputs(dataset, [path])
        yield ShardReport(stage=stage, shard=part, num_in=len(prompts), num_out=len(prompts), outputs=outputs)


def _draw_parts(dataset: DatasetDir, job: SampleJob, parts: Sequence[int]) -> Iterator[ShardReport]:
    directory, stage = EvaluationDir(dataset.root), draw_stage(job)
    for part in parts:
        path = directory.samples(job.model.key, key_of(job.scale), part)
        prompts, indices = part_prompts(directory, job, part), job.protocol.indices(part)
        with _ONE_AT_A_TIME:
            images = _draw(directory, job, part, prompts)
        samples = zip(indices, images, prompts, strict=True)
        with publish(path) as temporary:
            write_samples(temporary, [_sample(job, *sample) for sample in samples])
        outputs = describe_outputs(dataset, [path])
        yield ShardReport(stage=stage.name, shard=part, num_in=len(prompts), num_out=len(prompts), outputs=outputs)


def _draw(directory: EvaluationDir, job: SampleJob, part: int, prompts: list[str]) -> list[Image.Image]:
    """The images of a part, in the same batches whatever the process."""
    protocol = job.protocol
    encoder = _StoredContexts(directory.contexts(job.model.text_encoder[:12], part))
    sampler = Sampler(replace(_networks(job), text_encoder=cast(Any, encoder)))
    settings = SampleSettings(job.scale, protocol.num_steps, protocol.sampler, protocol.batch_size)
    seeds = [protocol.seed + index for index in protocol.indices(part)]
    starts = range(0, len(prompts), protocol.batch_size)
    images: list[Image.Image] = []
    for first in report_progress(starts, f"guidance {job.scale:g}, part {part}", len(starts), "batches"):
        batch = slice(first, first + protocol.batch_size)
        images += sampler.sample(prompts[batch], seeds[batch], settings)
    if len(images) > 1 and len({image.tobytes() for image in images}) == 1:
        raise UserError(
            f"{job.model.path} draws the same image for {len(images)} prompts and seeds, so its VAE or UNet is "
            "broken. Evaluate another checkpoint."
        )
    return images


def _sample(job: SampleJob, index: int, image: Image.Image, prompt: str) -> tuple[str, dict[str, bytes]]:
    file = io.BytesIO()
    image.save(file, "PNG")
    made = {"seed": job.protocol.seed + index, "guidance_scale": job.scale, "prompt": prompt}
    made_json = json.dumps(made, ensure_ascii=False).encode()
    return f"{index:09d}", {"png": file.getvalue(), "json": made_json, "txt": prompt.encode()}


class _StoredContexts:
    """Stands in for the text encoder: returns its stored outputs by token ids."""

    def __init__(self, path: Path):
        stored = read_tensors([path])
        rows = zip(stored["token_ids"], stored["contexts"], strict=True)
        self._known = {tuple(token_ids.tolist()): context for token_ids, context in rows}

    def __call__(self, token_ids: torch.Tensor) -> Any:
        found = torch.stack([self._known[tuple(row)] for row in token_ids.tolist()])
        return SimpleNamespace(last_hidden_state=found.to(token_ids.device))


def _networks(job: SampleJob) -> Networks:
    protocol = job.protocol
    dtypes = resolve(protocol.dtype), None if protocol.vae_dtype == "auto" else protocol.vae_dtype
    return _load(job.model.path, job.model.digest, protocol.weights, *dtypes, protocol.tokenizer)


@lru_cache(maxsize=1)
def _load(
    path: Path, digest: str, weights: Any, dtype: Fixed, vae_dtype: Fixed | None, tokenizer: str | None
) -> Networks:
    """Loads the networks and keeps them for the next part; the digest distinguishes a run's checkpoints."""
    decoding = torch_dtype(vae_dtype) if vae_dtype else None
    device = str(claim_device())
    return load_networks(path, device, torch_dtype(dtype), weights, tokenizer=tokenizer, vae_dtype=decoding)


def caption_stage(job: SampleJob) -> Stage[SampleJob]:
    """The stage that embeds the prompts of each part."""
    return plain_stage("captions", _parts, _caption_fingerprint, _embed_parts, uses_gpu=True)


def feature_stage(job: SampleJob) -> Stage[SampleJob]:
    """The stage that extracts the features of each part's images."""
    network = f"{job.network}-" if job.network else ""
    name = f"look-{network}{job.model.key}-{key_of(job.scale)}"
    return plain_stage(name, _parts, _feature_fingerprint, _extract_parts, uses_gpu=True)


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
    of_prompts = [] if job.network else [agreement_digest(job.protocol)]
    if job.protocol.preference is not None and not job.network:  # what was measured before there was one stays
        of_prompts.append(preference_digest(job.protocol.preference))
    return fingerprint("look/1", [*feature_config(job.protocol, _network(job)), *of_prompts], inputs=[drawn])


def _network(job: SampleJob) -> str:
    return job.network or job.protocol.networks[0]


def _extract_parts(dataset: DatasetDir, job: SampleJob, parts: Sequence[int]) -> Iterator[ShardReport]:
    directory, stage = EvaluationDir(dataset.root), feature_stage(job).name
    for part in parts:
        images, texts = read_images(directory.samples(job.model.key, key_of(job.scale), part))
        tensors = _arrays_of(images, texts, job)
        path = directory.features(job.model.key, key_of(job.scale), part, job.network)
        write_tensors(path, tensors)
        outputs = describe_outputs(dataset, [path])
        yield ShardReport(stage=stage, shard=part, num_in=len(images), num_out=len(images), outputs=outputs)


def _arrays_of(images: Sequence[Image.Image], texts: Sequence[str], job: SampleJob) -> dict[str, Tensor]:
    protocol = job.protocol
    make: dict[str, Callable[[], Tensor]] = {
        "features": lambda: features_of(images, protocol, _network(job)),
        "clip": lambda: embed_images(images, protocol),
        "preference": lambda: preference_scores(images, texts, protocol.preference or ""),
        "shown": lambda: stand_in(protocol.agreement).score_images(images, texts),
    }
    needed = {"features"} if job.network else arrays_needed(protocol, "drawn")
    return {name: make[name]() for name in sorted(needed)}


def read_images(tar: Path) -> tuple[list[Image.Image], list[str]]:
    """The images and prompts of a part; UserError if the tar is damaged."""
    samples = [members for _, members in read_samples(tar)]
    images = [Image.open(io.BytesIO(members["png"])).convert("RGB") for members in samples]
    return images, [members["txt"].decode() for members in samples]
