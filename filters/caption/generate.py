"""Captions that a network gives the images of a shard: asked at a server, or of a model that this machine runs."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from PIL import Image

from filters.caption.table import Caption, described_in
from filters.caption_config import PROMPTS, CaptionConfig
from sdtrain.dataset.files import read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import require_entry
from sdtrain.dataset.shard_report import fingerprint
from sdtrain.dataset.sync import fetch_if_stored
from sdtrain.endpoint.answer_log import AnswerLog
from sdtrain.endpoint.answers import MEANINGS, Answer, Kind
from sdtrain.endpoint.images import Questions, ask_about_images, in_threads, shard_images
from sdtrain.images.decode import decode_rgb

SETTING = "caption.endpoint"


class Generated:
    """What a network said about a shard's images.

    Attributes:
        captions: by uid, those that can be used, in the order of the prompts.
        kinds: by source, how many answers there were of each kind (`endpoint.answers.KINDS`).
        models: the ids under which a server answered.
        asked: by source, a digest of network, prompt and settings.
    """

    def __init__(self, asked: Mapping[str, str] = MappingProxyType({})) -> None:
        self.asked = asked
        self.captions: dict[str, list[Caption]] = {}
        self.kinds: dict[str, Counter[Kind]] = {}
        self.models: set[str] = set()

    def add(self, uid: str, source: str, answer: Answer) -> None:
        """Counts an answer, and takes its text, in one line, if it is whole."""
        self.kinds.setdefault(source, Counter())[answer.kind] += 1
        self.models |= {answer.model} - {""}
        if answer.kind == "text":
            text = " ".join(answer.text.split())
            self.captions.setdefault(uid, []).append(Caption(uid, source, text, uid))

    def remarks(self) -> list[str]:
        """A sentence for each kind of answer that left images with their alt text alone."""
        return [
            f"caption '{source}': {number:,} of {kinds.total():,} answers {kind} ({MEANINGS[kind]})"
            for source, kinds in self.kinds.items()
            for kind, number in sorted(kinds.items())
            if kind != "text"
        ]

    def described(self) -> dict[str, str]:
        """For the table's metadata."""
        kinds = {source: dict(sorted(counts.items())) for source, counts in self.kinds.items()}
        models = json.dumps(sorted(self.models))
        return {"answers": json.dumps(kinds), "models": models, "asked": json.dumps(dict(self.asked))}


def generate(dataset: DatasetDir, config: CaptionConfig, shard: int, images: Sequence[Mapping[str, Any]]) -> Generated:
    """Asks about all images of a shard, `uid`, `key` and `pixels` of each, but those that are answered already.

    Answers of an interrupted run are not asked again, nor those of a former one about the same pixels: what duplicates
    are called may have changed since, or the dataset has grown. UserError if the server or the model cannot be used, or
    the budget is spent; the answers until then are kept.
    """
    uids = {image["key"]: image["uid"] for image in images}
    with AnswerLog(dataset.caption_answers(shard), _key(dataset, config, shard)) as log:
        prompts = _prompts(config)
        generated = Generated({source: _asked(config, prompt) for source, prompt in prompts.items()})
        for uid, source, answer in _known(dataset, shard, generated.asked, images):
            log.know(uid, source, answer)
        if config.endpoint:
            questions = Questions(prompts, config.max_tokens, config.image_px)
            ask_about_images(dataset, shard, uids, questions, config.endpoint, SETTING, log)
        else:
            _ask_model(dataset, config, shard, uids, prompts, log)
        for uid, source in itertools.product(uids.values(), prompts):
            generated.add(uid, source, log[uid, source])
        return generated


def weights_of(config: CaptionConfig) -> list[str]:
    """Digest of the local model, for the fingerprint; none of a server's, which only tells its name."""
    if config.model is None:
        return []
    from filters.caption.captioner import model_digest

    return [model_digest(config.model)]


def _key(dataset: DatasetDir, config: CaptionConfig, shard: int) -> str:
    return fingerprint("answers/1", config.described(), [require_entry(dataset, "download", shard)], weights_of(config))


def _prompts(config: CaptionConfig) -> dict[str, str]:
    """Source -> prompt; by default those that suit the network."""
    if config.prompts or config.model is None:
        return config.prompts or PROMPTS
    from filters.caption.captioner import load_captioner

    return load_captioner(config.model).prompts


def _asked(config: CaptionConfig, prompt: str) -> str:
    """Digest of everything but the image that determines an answer."""
    return fingerprint("asked/1", [config.described_network(), prompt], weights=weights_of(config))[:16]


def _known(
    dataset: DatasetDir, shard: int, asked: Mapping[str, str], images: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str, Answer]]:
    """Yields uid, source and answer of the captions in the shard's former table that would be the same now."""
    path = dataset.captions_table(shard)
    fetch_if_stored(dataset, path)
    if not path.exists() or "asked" not in (described := described_in(path)):
        return
    same = {source for source, digest in json.loads(described["asked"]).items() if asked.get(source) == digest}
    models, pixels = json.loads(described["models"]), {image["uid"]: image["pixels"] for image in images}
    for row in read_parquet(path, ["uid", "source", "text", "pixels"]).to_pylist() if same else ():
        if row["source"] in same and row["pixels"] is not None and pixels.get(row["uid"]) == row["pixels"]:
            yield row["uid"], row["source"], Answer("text", row["text"], models[0] if len(models) == 1 else "")


def _ask_model(
    dataset: DatasetDir,
    config: CaptionConfig,
    shard: int,
    uids: Mapping[str, str],
    prompts: Mapping[str, str],
    log: AnswerLog,
) -> None:
    """Asks in whole batches, because what else is in a batch may change an answer."""
    from filters.caption.captioner import load_captioner

    if config.model is None:
        raise AssertionError("there is no model to ask")
    captioner = load_captioner(config.model)
    for batch in _unfinished_batches(dataset, config.model.batch_size, shard, uids, prompts, log):
        for name, prompt in prompts.items():
            answers = captioner.ask(list(batch.values()), prompt, config.max_tokens)
            for key, answer in zip(batch, answers, strict=True):
                log.add(uids[key], name, answer)


def _unfinished_batches(
    dataset: DatasetDir, size: int, shard: int, uids: Mapping[str, str], prompts: Collection[str], log: AnswerLog
) -> Iterator[dict[str, Image.Image]]:
    """Yields decoded images by key: those of batches in which any answer is missing, in one pass over the tar."""
    keys = list(uids)
    batches = [keys[start : start + size] for start in range(0, len(keys), size)]
    wanted = [batch for batch in batches if any((uids[key], name) not in log for key in batch for name in prompts)]
    batch_of = {key: number for number, batch in enumerate(wanted) for key in batch}
    waiting: dict[int, dict[str, Image.Image]] = {}
    for key, image in in_threads(_decoded, shard_images(dataset, shard, batch_of)):
        number = batch_of[key]
        waiting.setdefault(number, {})[key] = image
        if len(waiting[number]) == len(wanted[number]):
            read = waiting.pop(number)
            yield {key: read[key] for key in wanted[number]}


def _decoded(image: tuple[str, bytes]) -> tuple[str, Image.Image]:
    return image[0], decode_rgb(image[1])
