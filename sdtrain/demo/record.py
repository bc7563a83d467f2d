"""Records a whole run of the demo: where it ran, how long it took, how well the model does, and its energy."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from sdtrain.dataset.files import publish
from sdtrain.demo.checker import Agreement
from sdtrain.impact.energy import EnergyLog
from sdtrain.settings import Settings

RECORD = "record.json"


class DemoRecord(Settings):
    """One whole run of the demo, from nothing to the report.

    Attributes:
        day: on which it ended, UTC.
        load: of the machine when it began: processes that wanted a core, over the last minute.
        seen, unseen: share of samples whose colour and shape are those of the prompt, 0 to 1, by whether the pair was
            in the training data.
        kwh: of data preparation and training; None if unknown. Sampling and evaluation are not counted.
        kwh_measured: share of the training's hours that counters measured; all else is estimated.
    """

    day: str
    cpu: str
    cores: int
    gpu: str
    commit: str
    load: float
    seconds: float
    num_rows: int
    steps: int | None
    seen: float
    unseen: float
    kwh: float | None
    kwh_measured: float


class DemoClock:
    """Times a run of the demo into the folder `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._is_whole = not root.exists() or not any(root.iterdir())
        self._started, self._load = time.monotonic(), os.getloadavg()[0]

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def record(
        self, verdicts: Mapping[str, Agreement], run: Path, dataset: Path, num_rows: int, steps: int | None
    ) -> None:
        """Writes the record, unless the run went on with what an earlier one left, whose seconds it lacks."""
        if not self._is_whole:
            return
        import torch  # late: the flow is known to Prefect before any network is loaded

        from sdtrain.preflight.machine import commit, cpu_model

        kwh, measured = _energy(run, dataset)
        made = DemoRecord(
            day=f"{datetime.now(UTC):%Y-%m-%d}",
            cpu=cpu_model(),
            cores=len(os.sched_getaffinity(0)),
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
            commit=commit(),
            load=round(self._load, 2),
            seconds=round(self.seconds, 1),
            num_rows=num_rows,
            steps=steps,
            seen=round(verdicts["seen"].both, 4),
            unseen=round(verdicts["unseen"].both, 4),
            kwh=kwh,
            kwh_measured=measured,
        )
        with publish(self._root / RECORD) as temporary:
            temporary.write_text(made.model_dump_json(indent=1) + "\n")


def read_record(root: Path) -> DemoRecord | None:
    """The record in the demo's folder; None if there is none, or it is of another version."""
    try:
        return DemoRecord.model_validate_json((root / RECORD).read_bytes())
    except (OSError, ValidationError):
        return None


def _energy(run: Path, dataset: Path) -> tuple[float | None, float]:
    """Energy (kWh) of preparation and training, and the share of the training's hours that was measured."""
    from sdtrain.config.card import CardConfig
    from sdtrain.model_card.energy import footprint
    from sdtrain.model_card.records import dataset_facts

    sessions = EnergyLog(run / "energy.csv").sessions()
    trained, card = footprint(sessions), CardConfig()
    prepared = dataset_facts(dataset).kwh(card.data_gpu, card.data_cores)
    measured = trained.measured_gpu if trained.gpu_hours else trained.measured_cpu
    return None if trained.kwh is None else trained.kwh + prepared, measured
