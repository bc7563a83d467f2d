"""Reads what the card shows of a dataset: recipe, funnel, removals, hours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import yaml
from pydantic import Field

from sdtrain.dataset.layout import DatasetDir, current_stage
from sdtrain.dataset.removal_ledger import read_ledger
from sdtrain.impact.carbon import CORE_W, energy_kwh
from sdtrain.impact.gpus import board_watts
from sdtrain.settings import Settings


class DatasetFacts(Settings):
    """The card's facts of one dataset; unrecorded ones are empty."""

    root: str
    name: str = ""
    description: str = ""
    metadata: str = ""
    source: str = ""
    """Name of the user's own images, if they were imported and no metadata was read."""
    expected_rows: str = ""
    select_rules: dict[str, Any] = Field(default={})
    decide_rules: dict[str, Any] = Field(default={})
    duplicates: str = ""
    crops: str = ""
    """How images were cropped to squares before encoding."""
    funnel: list[tuple[str, str, str, int, int]] = Field(default=[])
    """(stage, reason, meaning, dropped, remaining); the first row is all metadata."""
    stage_hours: dict[str, float] = Field(default={})
    """Worker hours, summed over shards."""
    gpu_stages: list[str] = Field(default=["score", "encode"])
    """Stages that use a GPU if there is one; the default is for records of versions that did not say."""
    num_removed: int | None = None

    @property
    def hub_id(self) -> str | None:
        """The metadata's Hub id, if any."""
        parts = self.metadata.removeprefix("hf://datasets/").split("/")
        return (
            "/".join(parts[:2]).partition("@")[0]
            if self.metadata.startswith("hf://datasets/") and len(parts) > 1
            else None
        )

    def kwh(self, gpu: str | None, cores: float) -> float:
        """Energy of the stages at stated power, as nothing measured it; `gpu_stages` ran on `gpu` if given."""
        watts = board_watts(gpu) if gpu else None
        return sum(
            energy_kwh(hours, CORE_W * cores + (watts or 0.0) * (stage in self.gpu_stages))
            for stage, hours in self.stage_hours.items()
        )


def dataset_facts(root: Path) -> DatasetFacts:
    """Reads a dataset's records; UserError if its ledger of removals is damaged."""
    dataset = DatasetDir(root)
    return DatasetFacts(
        root=str(root),
        **_recipe(dataset.recipe),
        crops=_crops(dataset.latents_info),
        **_counts(dataset.database),
        num_removed=read_ledger(dataset.removed).num_rows if dataset.recipe.exists() else None,
    )


def _recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError):
        return {}
    select, decide = recipe.get("select", {}), recipe.get("decide") or recipe.get("keep", {})  # its former name
    return {
        **{name: recipe.get(name, "") for name in ("name", "description", "expected_rows")},
        "metadata": select.get("metadata", ""),
        "source": (recipe.get("source") or {}).get("name", ""),
        "select_rules": select.get("rules", {}),
        "decide_rules": decide.get("rules", {}),
        "duplicates": recipe.get("duplicates", {}).get("level", ""),
    }


def _crops(path: Path) -> str:
    """How the images of latents/info.json were resized and cropped; empty if there is no such record."""
    try:
        info = json.loads(path.read_text())
    except (OSError, ValueError):
        return ""
    several = f" ({info['num_crops']} of each image, one an epoch)" if "num_crops" in info else ""
    return f"{info.get('resize', 'not recorded')}{several}"


def _counts(database: Path) -> dict[str, Any]:
    """The funnel, and hours by stage, from tables: `filters` is above this layer and cannot be imported."""
    if not database.exists():
        return {}
    try:
        with duckdb.connect(str(database), read_only=True) as connection:
            rows = connection.execute("SELECT stage, reason, meaning, dropped, remaining FROM funnel").fetchall()
            hours = connection.execute("SELECT stage, sum(seconds) / 3600 FROM stages GROUP BY stage").fetchall()
            funnel = [(current_stage(stage), *row) for stage, *row in rows]
            spent = {current_stage(stage): num for stage, num in hours}
            return {"funnel": funnel, "stage_hours": spent} | _gpu_stages(connection)
    except duckdb.Error:
        return {}


def _gpu_stages(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    names = {name for name, *_ in connection.execute("DESCRIBE stages").fetchall()}
    if "uses_gpu" not in names:  # written by an earlier version
        return {}
    found = connection.execute("SELECT DISTINCT stage FROM stages WHERE uses_gpu ORDER BY stage").fetchall()
    return {"gpu_stages": [stage for (stage,) in found]}
