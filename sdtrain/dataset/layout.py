"""Defines each stage's files inside a dataset directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_FORMER_STAGES = {"keep": "decide"}
"""Names of stages in earlier versions, in whose manifests and journals they stand -> today's."""


def current_stage(name: str) -> str:
    """Today's name of a stage that an earlier version may have recorded under another one."""
    return _FORMER_STAGES.get(name, name)


@dataclass(frozen=True)
class DatasetDir:
    """The layout of one dataset on disk; every path in sdtrain comes from here.

    `root` is its directory, or the work folder of a dataset on S3 (`sdtrain.dataset.s3`), whose `url` is not empty.
    """

    root: Path
    url: str = ""

    def __str__(self) -> str:
        return self.url or str(self.root)

    @property
    def catalogues(self) -> Path:
        """The folder of what was imported; LAION's metadata in the form of a user's own images."""
        return self.root / "import"

    def catalogue(self, number: int) -> Path:
        """One row for every image that the import of this number found in the source."""
        return self.catalogues / f"{number:05d}.parquet"

    def selection(self, shard: int) -> Path:
        """The rows of one shard, chosen from the metadata."""
        return self.root / "selection" / f"{shard:05d}.parquet"

    def images_tar(self, shard: int) -> Path:
        """Downloaded images in img2dataset's layout."""
        return self.root / "images" / f"{shard:05d}.tar"

    def images_table(self, shard: int) -> Path:
        """One row for every selected row, downloaded or not, with the reason."""
        return self.root / "images" / f"{shard:05d}.parquet"

    def images_stats(self, shard: int) -> Path:
        """img2dataset's statistics of the shard."""
        return self.root / "images" / f"{shard:05d}_stats.json"

    def scores(self, shard: int) -> Path:
        """One row for every downloaded image: scores, hashes, decoded size."""
        return self.root / "scores" / f"{shard:05d}.parquet"

    @property
    def duplicates(self) -> Path:
        """The groups of duplicates."""
        return self.root / "duplicates.parquet"

    def captions_table(self, shard: int) -> Path:
        """All captions of the shard's images, each with its source."""
        return self.root / "captions" / f"{shard:05d}.parquet"

    def caption_answers(self, shard: int) -> Path:
        """The answers about a shard's images, while it is being captioned."""
        return self.root / "captions" / f"{shard:05d}.answers.jsonl"

    def answers_table(self, shard: int) -> Path:
        """The answers to the questions of rules in words, about the shard's images."""
        return self.root / "answers" / f"{shard:05d}.parquet"

    def answers_log(self, shard: int) -> Path:
        """The answers about a shard's images, while they are asked."""
        return self.root / "answers" / f"{shard:05d}.answers.jsonl"

    @property
    def spent(self) -> Path:
        """The folder of what was spent at servers, a file for each process."""
        return self.root / "spent"

    @property
    def duplicate_texts(self) -> Path:
        """What the duplicates of each image were called, while there are shards to caption."""
        return self.root / "duplicate_texts.parquet"

    @property
    def decisions(self) -> Path:
        """One row for every selected row: kept, or the first rule that dropped it."""
        return self.root / "decisions.parquet"

    @property
    def removed(self) -> Path:
        """The ledger of samples removed for good."""
        return self.root / "removed.parquet"

    @property
    def removed_rows(self) -> Path:
        """The rows that removed samples had in the shards that training reads."""
        return self.root / "removed-rows.parquet"

    @property
    def known_runs(self) -> Path:
        """The folder of the runs that trained on it, a file each; no part of the data."""
        return self.root / "runs"

    @property
    def removal(self) -> Path:
        """The plan of a removal in progress."""
        return self.root / "removal.json"

    @property
    def lock(self) -> Path:
        """The lock file; see `sdtrain.dataset.lock`."""
        return self.root / "dataset.lock"

    @property
    def pack_plan(self) -> Path:
        """The order of packing, while there are shards to pack."""
        return self.root / "pack_plan.parquet"

    def packed_tar(self, shard: int) -> Path:
        """Kept samples as WebDataset."""
        return self.root / "dataset" / f"{shard:05d}.tar"

    def packed_table(self, shard: int) -> Path:
        """The samples of the packed shard, with their offsets."""
        return self.root / "dataset" / f"{shard:05d}.parquet"

    def latents_tar(self, shard: int) -> Path:
        """Posterior moments, captions and provenance."""
        return self.root / "latents" / f"{shard:05d}.tar"

    def latents_table(self, shard: int) -> Path:
        """The samples of the latents shard, with their offsets."""
        return self.root / "latents" / f"{shard:05d}.parquet"

    @property
    def latents_info(self) -> Path:
        """How the latents were made: VAE digest, resolution, normalisation."""
        return self.root / "latents" / "info.json"

    def manifest_entry(self, stage: str, shard: int) -> Path:
        """The record that one stage finished one shard, under the stage's former name where only that exists."""
        path, *former = (folder / f"{shard:05d}.json" for folder in self.manifest_folders(stage))
        found = [entry for entry in former if entry.exists()]
        return found[0] if found and not path.exists() else path

    def manifest_folders(self, stage: str) -> list[Path]:
        """The folders of a stage's records: its own, and those of its former names."""
        names = [stage, *(former for former, name in _FORMER_STAGES.items() if name == stage)]
        return [self.root / "manifest" / name for name in names]

    @property
    def recipe(self) -> Path:
        """The recipe as run, overrides included."""
        return self.root / "recipe.yaml"

    @property
    def database(self) -> Path:
        """DuckDB views over everything above."""
        return self.root / "metadata.duckdb"

    @property
    def report(self) -> Path:
        """The page with funnel, scores and examples."""
        return self.root / "report.html"

    @property
    def search(self) -> Path:
        """The vector index for image search; rebuilt if missing."""
        return self.root / "search"

    def relative(self, path: Path) -> str:
        """`path` as manifests name it: relative to the root, with forward slashes."""
        return path.relative_to(self.root).as_posix()


def index_path(table: Path) -> Path:
    """The copy of a latents table that gives training single rows (`sdtrain.loading.shard_catalog`)."""
    return table.with_suffix(".index.arrow")


def delete_index(table: Path) -> None:
    """Deletes that copy, including earlier versions' format."""
    for path in (index_path(table), table.with_suffix(".index.safetensors")):
        path.unlink(missing_ok=True)
