"""States what each stage has to do, for plans; a plan reads this without loading what the stages load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Amount = Literal["metadata", "rows", "urls", "images", "captions", "answers", "kept", "crops"]
"""Rows of the metadata, selected rows, URLs to fetch, downloaded images, captions and answers that a network is to give
for these, kept samples, crops of these."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """A stage's work, for estimates of time and disk space by the rates in sdtrain/plan/rates.yaml.

    Attributes:
        num: the unit of its input.
        rate: of these per second and core or GPU, or of the whole server.
        on: what shares the work; a server is none of the plan's machines.
        writes: its output, and the bytes of each; None if negligible.
    """

    num: Amount
    rate: str
    on: Literal["cores", "one core", "GPUs", "a server"]
    writes: tuple[Amount, str] | None


WORK: dict[str, Work | None] = {
    "select": Work(num="metadata", rate="select_rows", on="cores", writes=("rows", "metadata_row_bytes")),
    "download": Work(num="urls", rate="download_images", on="cores", writes=("images", "image_bytes")),
    "score": Work(num="images", rate="score_images", on="GPUs", writes=("images", "score_row_bytes")),
    "dedup": Work(num="images", rate="dedup_images", on="one core", writes=None),
    "caption": Work(num="captions", rate="caption_requests", on="a server", writes=None),
    "ask": Work(num="answers", rate="ask_requests", on="a server", writes=None),
    "decide": None,
    "pack": Work(num="kept", rate="pack_images", on="cores", writes=("kept", "image_bytes")),
    "encode": Work(num="crops", rate="encode_images", on="GPUs", writes=("crops", "latent_bytes")),
}
"""The stages that `sdtrain plan` shows where a recipe asks for them; None: their rates are not known."""
CAPTIONS_HERE = Work(num="captions", rate="caption_model", on="GPUs", writes=None)
"""Of `caption` where the recipe names a model that the machines themselves run."""
