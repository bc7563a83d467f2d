"""The options of a build, for `sdtrain build` and the flow build-dataset."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from sdtrain.options import option
from sdtrain.redaction import Location

Count = Annotated[int, Ge(1)]
AestheticScore = Annotated[float, Ge(0), Le(10)]
Probability = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options outside the recipe; None keeps the recipe's setting."""

    metadata: Location | None = option(
        None, "Parquet with LAION's columns: file, folder, glob.", sets=["select.metadata"]
    )
    output: Location = option("data/{recipe}", "The dataset's directory; {recipe} stands for the recipe's name.")
    limit: Count | None = option(None, "At most this many rows, first in shuffled order.", sets=["select.limit"])
    min_side: Count | None = option(
        None,
        "Shorter side in pixels, at least.",
        sets=["select.rules.min_side"],
        sets_if_given=["decide.rules.min_side"],
    )
    min_aesthetic: AestheticScore | None = option(
        None, "Aesthetic score (V2), more than.", sets=["select.rules.min_aesthetic"]
    )
    max_watermark: Probability | None = option(
        None, "Watermark probability, less than.", sets=["select.rules.max_watermark"]
    )
    samples_per_shard: Count | None = option(
        None, "Samples in one shard.", sets=["select.samples_per_shard", "pack.samples_per_shard"]
    )
    allow_private_hosts: bool | None = option(
        None, "Fetch from loopback and private networks too.", sets=["download.allow_private_hosts"]
    )
    new_files: Literal["append", "reshuffle"] | None = option(
        None, "Metadata files added since: shards after the others, or a new shuffle.", sets=["select.new_files"]
    )
    retry_failed: bool = option(False, "First fetch rows again that failed for a reason that may have passed.")
    work_dir: str | None = option(
        None, "For an output on s3://: where its files lie on this machine. Default: the user's cache."
    )
    keep_local: bool = option(
        True, "For an output on s3://: whether images and latents stay on this machine once they are there."
    )
