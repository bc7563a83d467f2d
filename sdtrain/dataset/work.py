"""States what each stage has to do, for plans; a plan reads this without loading what the stages load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Amount = Literal["metadata", "rows", "urls", "images", "kept", "crops"]
"""Rows of the metadata, selected rows, URLs to fetch, downloaded images, kept samples, crops of these."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A stage's work, for estimates of time and disk space by the rates in sdtrain/plan/rates.yaml.

    Attributes:
        num: the unit of its input.
        rate: of these per second and core or GPU.
        on: what shares the work.
        writes: its output, and the bytes of each; None if negligible.
    """

    num: Amount
    rate: str
    on: Literal["cores", "one core", "GPUs"]
    writes: tuple[Amount, str] | None


WORK: dict[str, Work | None] = {
    "select": Work(num="metadata", rate="select_rows", on="cores", writes=("rows", "metadata_row_bytes")),
    "download": Work(num="urls", rate="download_images", on="cores", writes=("images", "image_bytes")),
    "score": Work(num="images", rate="score_images", on="GPUs", writes=("images", "score_row_bytes")),
    "dedup": Work(num="images", rate="dedup_images", on="one core", writes=None),
    "decide": None,
    "pack": Work(num="kept", rate="pack_images", on="cores", writes=("kept", "image_bytes")),
    "encode": Work(num="crops", rate="encode_images", on="GPUs", writes=("crops", "latent_bytes")),
}
"""The stages that `sdtrain plan` shows; None: their rates are not known."""
