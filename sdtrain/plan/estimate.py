"""Estimates the resources of each stage of a dataset and of each training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sdtrain.config import TrainConfig
from sdtrain.dataset.work import Amount, Work
from sdtrain.errors import UserError
from sdtrain.impact.carbon import CORE_W, emissions_kg, energy_kwh
from sdtrain.impact.gpus import board_watts
from sdtrain.plan.rates import TO_STATE, Rates, find_rate, stated_speed
from sdtrain.plan.requests import Requests
from sdtrain.plan.speeds import Load, SpeedEstimate, estimate_speed, require_gpu

_LARGE_MICRO_BATCH = 32


@dataclass(frozen=True)
class Machines:
    """The machines of a plan; grid intensity and price, in the user's currency, are None if not stated."""

    num_gpus: int
    gpu: str
    kg_per_kwh: float | None = None
    price_per_gpu_hour: float | None = None

    def __post_init__(self) -> None:
        require_gpu(self.gpu)


@dataclass(frozen=True)
class DatasetJob:
    """A dataset to build, with stored images of `image_px`; `num_rows` None takes the recipe's known number."""

    recipe: str
    image_px: int
    resolution: int
    num_crops: int = 1
    num_rows: int | None = None
    has_texts: bool = False
    """Whether text embeddings are stored beside the latents."""
    has_urls_together: bool = False
    """Whether the rows of a URL are in one shard (`select.shuffle_by: url`), so that it is fetched once."""
    requests: Mapping[str, Requests] = field(default_factory=dict)
    """What a network is asked about each image, by stage."""


@dataclass(frozen=True)
class Line:
    """One stage of `part` (dataset or run); hours are wall clock on all machines, None if no rate is known.

    `num` counts input rows or images. `cost` of the GPUs is in the user's currency, None if no price was stated; `kg`
    of CO2 equivalents None if no region was. `source` and `remarks` are the rate's: its origin and further assumptions.
    """

    part: str
    stage: str
    num: float
    disk_bytes: float
    hours: float | None
    gpu_hours: float
    core_hours: float
    cost: float | None
    kg: float | None
    source: str
    remarks: tuple[str, ...] = ()


class Planner:
    """Makes lines from rates (work per second, and shares) and machines."""

    def __init__(self, rates: Rates, machines: Machines):
        self._rates, self._machines = rates, machines

    def dataset(self, job: DatasetJob, stages: Mapping[str, Work | None]) -> list[Line]:
        """The stages of a dataset but for those of `not_counted`; UserError if a recipe or size has no rates."""
        amounts = self._amounts(job)
        sizes = {
            "image_bytes": self._value(_nearest_size(job.image_px)),
            "latent_bytes": latent_bytes(job.resolution) + self._text_bytes(job) / job.num_crops,
        }
        lines = []
        for name, work in stages.items():
            if work is not None:
                written, size = work.writes or (work.num, "")
                each = (sizes[size] if size in sizes else self._value(size)) if size else 0.0
                line = self._stage(job, name, work, amounts[work.num], amounts[written] * each)
                lines.append(replace(line, remarks=self._remarks(job, line, work)))
        return lines

    def _remarks(self, job: DatasetJob, line: Line, work: Work) -> tuple[str, ...]:
        if line.stage in job.requests:
            return job.requests[line.stage].remarks(line.stage, line.num, self._rates)
        return (self._fetched_once(),) if work.num == "urls" and job.has_urls_together else ()

    def _fetched_once(self) -> str:
        return f"a URL is fetched once: urls_per_row {self._value('urls_per_row'):g}, {self._rates['urls_per_row']}"

    def _text_bytes(self, job: DatasetJob) -> float:
        return self._value("text_embedding_bytes") if job.has_texts else 0.0

    def _amounts(self, job: DatasetJob) -> dict[Amount, float]:
        rows = job.num_rows or self._value_of_recipe("rows", job, "--rows N")
        known_metadata = self._rates.get(f"metadata_{job.recipe}")
        metadata = known_metadata.value if known_metadata else rows
        images = rows * (1 - self._value("link_rot"))
        kept = images * self._value("kept_share")
        urls = rows * self._value("urls_per_row") if job.has_urls_together else rows
        selected: dict[Amount, float] = {"metadata": metadata, "rows": rows, "urls": urls}
        asked = {stage: images * requests.num for stage, requests in job.requests.items()}
        selected |= {"captions": asked.get("caption", 0.0), "answers": asked.get("ask", 0.0)}
        return selected | {"images": images, "kept": kept, "crops": kept * job.num_crops}

    def training(self, config: TrainConfig) -> Line:
        """A training run, with the largest micro-batch up to the config's that divides each GPU's share.

        UserError if its resolution has no rate on this GPU, or the GPUs cannot share its batch.
        """
        machines, resolution = self._machines, config.data.resolution
        load = Load(machines.gpu, machines.num_gpus, _micro_batch(config, machines.num_gpus), resolution)
        stated = self._rates.get(stated_speed(machines.gpu, resolution))
        speed = estimate_speed(load) if stated is None else SpeedEstimate(stated.value, str(stated))
        remarks = [*speed.remarks]
        if load.micro_batch < _wanted_micro_batch(config) and stated is None:
            remarks.insert(0, _small_micro_batch(config, load))
        num = config.steps * config.global_batch_size
        line = self._on_gpus(config.name, "train", num, 0.0, speed.images_per_s, speed.source)
        return replace(line, remarks=tuple(remarks))

    def _value(self, name: str) -> float:
        return find_rate(name, self._rates).value

    def _value_of_recipe(self, what: str, job: DatasetJob, instead: str) -> float:
        found = self._rates.get(f"{what}_{job.recipe}")
        if found is None:
            raise UserError(f"How many rows '{job.recipe}' selects is not known. Give {instead}.")
        return found.value

    def _stage(self, job: DatasetJob, stage: str, work: Work, num: float, disk: float) -> Line:
        if work.rate in TO_STATE and work.rate not in self._rates:
            source = f"not known: state --assume {work.rate}=N, in {TO_STATE[work.rate]}"
            return replace(self._line(job.recipe, stage, num, disk, 0.0, 0.0, 0.0, source), hours=None)
        rate = find_rate(work.rate, self._rates)
        per_s, source = rate.value, str(rate)
        if rate.resolution not in (None, job.resolution):
            per_s *= (rate.resolution / job.resolution) ** 2
            source += f"; {rate.value:g} at {rate.resolution} px, {per_s:.4g} at {job.resolution} by their pixels"
        if work.on == "GPUs":
            return self._on_gpus(job.recipe, stage, num, disk, per_s, source)
        if work.on == "a server":
            return self._line(job.recipe, stage, num, disk, num / per_s / 3600, 0.0, 0.0, source)
        core_hours = num / per_s / 3600
        hours = core_hours if work.on == "one core" else core_hours / self._value("cpu_cores")
        return self._line(job.recipe, stage, num, disk, hours, 0.0, core_hours, source)

    def _on_gpus(self, part: str, stage: str, num: float, disk: float, per_s: float, source: str) -> Line:
        gpu_hours = num / per_s / 3600
        return self._line(part, stage, num, disk, gpu_hours / self._machines.num_gpus, gpu_hours, 0.0, source)

    def _line(
        self, part: str, stage: str, num: float, disk: float, hours: float, gpu_h: float, core_h: float, source: str
    ) -> Line:
        machines = self._machines
        price, intensity = machines.price_per_gpu_hour, machines.kg_per_kwh
        kwh = energy_kwh(gpu_h, board_watts(machines.gpu) or 0.0) + energy_kwh(core_h, CORE_W)
        cost = None if price is None else gpu_h * price
        kg = None if intensity is None else emissions_kg(kwh, intensity)
        return Line(part, stage, num, disk, hours, gpu_h, core_h, cost, kg, source)


def not_counted(stages: Mapping[str, Work | None]) -> list[str]:
    """The stages whose rates are not known."""
    return [name for name, work in stages.items() if work is None]


def latent_bytes(resolution: int) -> int:
    """A latent's moments on disk: 8 channels of float16 at 1/8 of the side, without tar headers."""
    return 8 * (resolution // 8) ** 2 * 2


def total(lines: Sequence[Line]) -> Line:
    """The sum of all lines, as if run one after the other; hours that are not known are not in it."""
    costs, kgs = [line.cost for line in lines], [line.kg for line in lines]
    return Line(
        "all",
        "",
        0.0,
        sum(line.disk_bytes for line in lines),
        sum(line.hours or 0.0 for line in lines),
        sum(line.gpu_hours for line in lines),
        sum(line.core_hours for line in lines),
        None if None in costs else sum(cost for cost in costs if cost is not None),
        None if None in kgs else sum(kg for kg in kgs if kg is not None),
        "",
    )


def _micro_batch(config: TrainConfig, num_gpus: int) -> int:
    if not (sizes := config.micro_batches(num_gpus)):
        config.require_share(num_gpus)  # raises
    return max(size for size in sizes if size <= _wanted_micro_batch(config))


def _wanted_micro_batch(config: TrainConfig) -> int:
    """The config's; for auto, as large as those of most published speeds."""
    return _LARGE_MICRO_BATCH if config.micro_batch_size == "auto" else config.micro_batch


def _small_micro_batch(config: TrainConfig, load: Load) -> str:
    return (
        f"a global batch of {config.global_batch_size:,} leaves each of {load.num_gpus} GPUs "
        f"{config.global_batch_size // load.num_gpus} images a step, so micro-batches of {load.micro_batch}: the "
        "smaller they are, the more the host is the limit and not the GPU"
    )


def _nearest_size(image_px: int) -> str:
    sizes = (256, 512, 1024)
    return f"image_bytes_{min(sizes, key=lambda size: abs(size - image_px))}"
