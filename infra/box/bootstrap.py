"""Sets up Prefect's server: work pools, automations and deployments.

`python -m infra.box.bootstrap` does so at PREFECT_API_URL; the box runs it at each start, `make deploy` after a change
of prefect.yaml. Repeating it changes nothing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from infra.box.layout import ROOT
from sdtrain.dataset.files import publish

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

# Prefect is imported late: the supervisor needs only the pools' names.


@dataclass(frozen=True)
class Pool:
    """A work pool with one worker; `limit` is its concurrent runs."""

    name: str
    limit: int | None = None


POOLS = (Pool("cpu"), Pool("gpu"), Pool("train", limit=1))


def pool_of(tags: Iterable[str]) -> str:
    """A deployment's pool: `train` runs one training at a time, `gpu` scoring and encoding."""
    if "training" in tags:
        return "train"
    return "cpu" if "demo" in tags else "gpu"


def assign_pools(source: Path = ROOT / "prefect.yaml") -> dict[str, Any]:
    """The deployments of `source`, assigned to pools by tag."""
    config = yaml.safe_load(source.read_text())
    for deployment in config["deployments"]:
        deployment["work_pool"] = {"name": pool_of(deployment.get("tags", []))}
    return {"deployments": config["deployments"]}


def write_deployments(target: Path) -> None:
    """Writes a prefect.yaml for the box's pools."""
    with publish(target) as temporary:
        temporary.write_text(yaml.safe_dump(assign_pools(), sort_keys=False, allow_unicode=True))


def bootstrap() -> None:
    """Applies pools, automations and deployments; CalledProcessError if one is refused, and Prefect printed why."""
    from prefect.client.orchestration import get_client

    from flows.support.automations import apply_automations

    with get_client(sync_client=True) as client:
        for pool in POOLS:
            _apply_pool(client, pool)
        apply_automations(client)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "prefect.yaml")
        write_deployments(target)
        prefect = Path(sys.executable).with_name("prefect")
        command: list[str | Path] = [prefect, "--no-prompt", "deploy", "--all", "--prefect-file", target]
        subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603


def _apply_pool(client: SyncPrefectClient, pool: Pool) -> None:
    """Creates the pool; an existing one keeps its owner's changes, but gets a missing limit."""
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        existing = client.read_work_pool(pool.name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        wanted = WorkPoolCreate(
            name=pool.name, type="process", base_job_template=template, concurrency_limit=pool.limit
        )
        client.create_work_pool(wanted)
        return
    if pool.limit is not None and existing.concurrency_limit is None:
        client.update_work_pool(pool.name, WorkPoolUpdate(concurrency_limit=pool.limit))


if __name__ == "__main__":
    bootstrap()
