"""The box's work pools, and which of the repository's deployments goes to which."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.box.layout import ROOT
from sdtrain.dataset.files import publish


@dataclass(frozen=True)
class Pool:
    """A work pool with one worker.

    Attributes:
        name: of the pool and of its worker's service.
        limit: runs at once; None for no limit.
    """

    name: str
    limit: int | None = None


POOLS = (Pool("cpu"), Pool("gpu"), Pool("train", limit=1))


def pool_of(tags: Iterable[str]) -> str:
    """The pool for a deployment with these tags: training one after the other, what scores and encodes on `gpu`."""
    if "training" in tags:
        return "train"
    return "cpu" if "demo" in tags else "gpu"


def spread(source: Path = ROOT / "prefect.yaml") -> dict[str, Any]:
    """The deployments of `source`, each with the pool of its tags in place of its own."""
    config = yaml.safe_load(source.read_text())
    for deployment in config["deployments"]:
        deployment["work_pool"] = {"name": pool_of(deployment.get("tags", []))}
    return {"deployments": config["deployments"]}


def write_deployments(target: Path) -> None:
    """Writes a prefect.yaml for these pools."""
    with publish(target) as temporary:
        temporary.write_text(yaml.safe_dump(spread(), sort_keys=False, allow_unicode=True))
