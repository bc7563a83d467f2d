"""`sdtrain batch`: a training batch as the network sees it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdtrain.cli.output import AsJson, print_json, prints_to_stderr

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdtrain.config import TrainConfig
    from sdtrain.sampling.batch_view import ShownSample

# Our own code is imported inside the command, so that help does not wait for torch.


def batch(
    name: Annotated[str, typer.Argument(help="A run's directory, or a training config: a name or a YAML file.")],
    step: Annotated[int, typer.Option(help="Optimizer step, counted from 0.", min=0)],
    data: Annotated[str | None, typer.Option(help="The dataset's directory; by default the config's.")] = None,
    first: Annotated[int, typer.Option(help="First sample of the batch that is shown.", min=0)] = 0,
    num: Annotated[int, typer.Option(help="How many are shown.", min=1)] = 8,
    output: Annotated[Path, typer.Option(help="Sheet of images: .html or .png.")] = Path("batch.html"),
    as_json: AsJson = False,
) -> None:
    """Show a training batch as the network sees it: images, crops, captions, dropped or not, timesteps, noise."""
    from sdtrain.sampling.batch_view import show_batch
    from sdtrain.training.run_dir import is_run_dir

    run = Path(name) if is_run_dir(Path(name)) else None
    config = _config(name, run, step, data)
    with prints_to_stderr(as_json):
        last = min(first + num, config.global_batch_size)
        shown = list(show_batch(config, step, range(first, last), run))
        _write(shown, config, step, output)
    if as_json:
        print_json([sample.row() for sample in shown])
    else:
        print(*(sample.title() + f": {sample.drawn.caption}" for sample in shown), sep="\n")
        print(output)


def _config(name: str, run: Path | None, step: int, data: str | None) -> TrainConfig:
    from sdtrain.train import configure
    from sdtrain.training.run_dir import RunDir

    if run is None:
        return configure(name, data)
    config = RunDir(run).config_at(step)
    if data is None:
        return config
    source = config.data.model_copy(update={"root": data, "sources": ()})
    return config.model_copy(update={"data": source})


def _write(shown: Sequence[ShownSample], config: TrainConfig, step: int, output: Path) -> None:
    from filters.search.sheet import Cell, Row, write_sheet

    rows = [
        Row(
            sample.title(),
            [
                Cell(sample.image, "the latent, decoded", sample.drawn.caption, marked=sample.drawn.is_dropped),
                Cell(sample.noisy, f"with its noise, t = {sample.drawn.timestep}", ""),
            ],
        )
        for sample in shown
    ]
    notes = [
        f"{len(shown):,} of {config.global_batch_size:,} samples. A red frame: the caption is dropped, and the network "
        "is given an empty one."
    ]
    write_sheet(output, f"{config.name}: step {step:,}", notes, rows)
