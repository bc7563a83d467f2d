"""The command that draws pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sdtrain.errors import UserError


def sample(
    model: Annotated[Path, typer.Argument(help="A diffusers folder, or a training run or checkpoint.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Pictures are drawn for each.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")] = None,
    output: Annotated[Path, typer.Option(help="Where the PNGs go.")] = Path("samples"),
    seed: Annotated[int, typer.Option(help="Seed of the first picture; each next one has the next.", min=0)] = 0,
    per_prompt: Annotated[int, typer.Option(help="Pictures for each prompt.", min=1)] = 1,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none.")] = 7.5,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 50,
    sampler: Annotated[Literal["plms", "ddim", "dpm"] | None, typer.Option(help="By default what fits.")] = None,
    weights: Annotated[Literal["ema", "raw"], typer.Option(help="Of a training run: averaged or raw.")] = "ema",
    batch_size: Annotated[int, typer.Option(help="Pictures at once.", min=1)] = 16,
    processes: Annotated[int | None, typer.Option(help="Processes, one a GPU; by default all GPUs.", min=1)] = None,
    grid: Annotated[bool, typer.Option(help="Also one sheet of all, grid.png, a row a prompt.")] = False,
) -> None:
    """Draw pictures for prompts; each has its own seed, whatever else is drawn."""
    from sdtrain.draw import Model, all_devices, draw, make_jobs, read_prompts, save_picture
    from sdtrain.sample import SampleSettings, make_grid

    wanted = [*(prompts or []), *(read_prompts(prompts_file) if prompts_file else [])]
    if not wanted:
        raise UserError("There is no prompt. Name some, or give --prompts-file.")
    settings = SampleSettings(guidance, steps, sampler, batch_size)
    chosen, pictures = Model(model, weights), []
    for job, picture in draw(chosen, make_jobs(wanted, seed, per_prompt), settings, all_devices(processes)):
        path = output / f"{job.seed:05d}.png"
        save_picture(path, picture, job, chosen, settings)
        print(path)
        pictures += [picture] if grid else []
    if grid:
        sheet = make_grid(pictures, per_prompt if per_prompt > 1 else None)
        sheet.save(output / "grid.png")
        print(output / "grid.png")
