"""`sdtrain sample` and `sdtrain export`: draw images, and write models in other formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sdtrain.errors import UserError
from sdtrain.precision import Precision, resolve

if TYPE_CHECKING:
    from sdtrain.sampling.batch import Job
    from sdtrain.sampling.output_folder import SampleFolder

Flagged = Literal["black", "refuse"]


def sample(
    model: Annotated[Path, typer.Argument(help="A run, a checkpoint, a diffusers folder or a CompVis file.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Images are drawn for each.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")] = None,
    output: Annotated[Path, typer.Option(help="Where the PNGs go.")] = Path("samples"),
    seed: Annotated[int, typer.Option(help="Seed of the first image; each next one has the next.", min=0)] = 0,
    per_prompt: Annotated[int, typer.Option(help="Images for each prompt.", min=1)] = 1,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none.")] = 7.5,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 50,
    sampler: Annotated[Literal["plms", "ddim", "dpm"] | None, typer.Option(help="By default what fits.")] = None,
    weights: Annotated[Literal["ema", "raw"], typer.Option(help="Averaged or raw, where there are both.")] = "ema",
    dtype: Annotated[
        Precision, typer.Option(help="Of UNet and text encoder; auto: bf16 where it is faster here, else fp32.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="Images at once.", min=1)] = 16,
    processes: Annotated[int | None, typer.Option(help="Processes, one a GPU; by default all GPUs.", min=1)] = None,
    grid: Annotated[bool, typer.Option(help="Also one sheet of all, grid.png, a row a prompt.")] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave images there that an earlier, same command drew.")
    ] = False,
    compile_unet: Annotated[
        Literal["off", "regional", "whole"], typer.Option("--compile", help="torch.compile: pays for many images.")
    ] = "off",
    tokenizer: Annotated[
        str | None, typer.Option(help="For a CompVis file, which holds none: folder, hub id or `demo`; else CLIP's.")
    ] = None,
    safety_checker: Annotated[
        str | None, typer.Option(help="Judges every image: its folder, a pipeline's folder with one, or a hub id.")
    ] = None,
    flagged: Annotated[
        Flagged, typer.Option(help="What is written for an image that it flags: black, or nothing.")
    ] = "black",
) -> None:
    """Draw images for prompts; each has its own seed, whatever else is drawn."""
    from sdtrain.config.sections import SpeedConfig
    from sdtrain.formats.any_model import resolve_checkpoint
    from sdtrain.precision import torch_dtype
    from sdtrain.sampling.batch import Model, make_jobs, read_prompts
    from sdtrain.sampling.output_folder import SampleFolder
    from sdtrain.sampling.sampler import SampleSettings

    wanted = [*(prompts or []), *(read_prompts(prompts_file) if prompts_file else [])]
    if not wanted:
        raise UserError("There is no prompt. Name some, or give --prompts-file.")
    speed = SpeedConfig(compile=compile_unet)
    chosen = Model(resolve_checkpoint(model), weights, torch_dtype(resolve(dtype)), tokenizer, speed)
    folder = SampleFolder(output, chosen, SampleSettings(guidance, steps, sampler, batch_size), safety_checker, flagged)
    jobs = make_jobs(wanted, seed, per_prompt)
    _fill(folder, jobs, keep, processes)
    if grid:
        _write_sheet(folder, jobs, per_prompt if per_prompt > 1 else None)


def export(
    model: Annotated[
        Path, typer.Argument(help="A run (its newest checkpoint), a checkpoint, a diffusers folder, or a CompVis file.")
    ],
    output: Annotated[Path, typer.Argument(help="NAME.ckpt or NAME.safetensors: a CompVis file; else a folder.")],
    weights: Annotated[Literal["ema", "raw", "both"], typer.Option(help="Averaged, raw, or both in one.")] = "ema",
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Precision of the weights.")] = "fp32",
    tokenizer: Annotated[
        str | None, typer.Option(help="For a CompVis file, which holds none: folder, hub id or `demo`; else CLIP's.")
    ] = None,
    ema_length: Annotated[
        float | None,
        typer.Option(help="Average of this length, as in 0.08, made from those of ema.post_hoc."),
    ] = None,
) -> None:
    """Write a model as a diffusers folder or as a CompVis file; either can be read again, here and elsewhere."""
    from sdtrain.formats.export import ExportSettings, export_model

    print(export_model(model, output, ExportSettings(weights, dtype, tokenizer, ema_length)))


def _fill(folder: SampleFolder, jobs: Sequence[Job], keep: bool, processes: int | None) -> None:
    """Draws this process's share of the jobs; reports images drawn, kept and flagged."""
    from sdtrain.sampling.batch import all_devices, draw_batches, rank_and_device, split_batches
    from sdtrain.sampling.output_folder import Writer
    from sdtrain.sampling.safety import check_images, load_safety_checker

    rank, world_size, device = rank_and_device()
    devices = [device] if device else all_devices(processes)
    check = load_safety_checker(folder.safety_checker, devices[0]) if folder.safety_checker else None
    batches = split_batches(jobs, folder.settings)[rank::world_size]
    pending = folder.pending(batches) if keep else batches
    drawn, num_flagged = draw_batches(folder.model, pending, folder.settings, devices), 0
    with Writer(folder) as writer:
        for result in check_images(drawn, check, folder.flagged):
            num_flagged += result.flagged
            if result.image is not None:
                print(writer.save(result.job, result.image, result.flagged))
            else:
                folder.refuse(result.job)
    num, num_drawn = (sum(map(len, part)) for part in (batches, pending))
    if keep:
        print(f"{num_drawn} images drawn, {num - num_drawn} kept")
    if check:
        what = "are black" if folder.flagged == "black" else "were not written"
        print(f"{num_flagged} of {num_drawn} images were flagged by the safety checker and {what}")


def _write_sheet(folder: SampleFolder, jobs: Sequence[Job], columns: int | None) -> None:
    from sdtrain.sampling.batch import rank_and_device, wait_for_all

    wait_for_all()
    if rank_and_device()[0] == 0:
        print(folder.write_sheet(jobs, columns))
