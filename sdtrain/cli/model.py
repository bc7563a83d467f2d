"""`sdtrain sample` and `sdtrain export`: draw images, and write models in other formats."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sdtrain.errors import UserError
from sdtrain.precision import Precision, resolve

if TYPE_CHECKING:
    from sdtrain.sampling.batch import Job, Model
    from sdtrain.sampling.credentials import Credentials
    from sdtrain.sampling.output_folder import SampleFolder
    from sdtrain.sampling.sampler import SampleSettings
    from sdtrain.sampling.start_image import StartImage

Flagged = Literal["black", "refuse"]


def sample(
    model: Annotated[Path, typer.Argument(help="A run, a checkpoint, a diffusers folder or a CompVis file.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Images are drawn for each.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="One prompt a line, or a table: .csv, .tsv, .jsonl, .parquet.")
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="The table's column of prompts; by default `prompt`.")
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What to steer away from, instead of the empty prompt.")] = "",
    output: Annotated[
        Path,
        typer.Option(help="Where the PNGs go; other images there are never replaced: numbering goes on after them."),
    ] = Path("samples"),
    seed: Annotated[int | None, typer.Option(help="Of the first image, 0; each next one has the next.", min=0)] = None,
    per_prompt: Annotated[int | None, typer.Option(help="Images for each prompt, 1.", min=1)] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Instead: each prompt with each of these, as in 0-15 or 3,7.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="In pixels, a multiple of 8; by default the model's.")] = None,
    height: Annotated[int | None, typer.Option(help="Likewise.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="Begin from this image, resized to cover the size and cropped at its centre.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of --image is redrawn: above 0 to 1, by default 0.75 of the steps.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none.")] = 7.5,
    steps: Annotated[
        int, typer.Option(help="Sampling steps: 1 to 999 (plms, ddim) or 998 (dpm) in SD v1.", min=1)
    ] = 50,
    sampler: Annotated[Literal["plms", "ddim", "dpm"] | None, typer.Option(help="By default what fits.")] = None,
    weights: Annotated[Literal["ema", "raw"], typer.Option(help="Averaged or raw, where there are both.")] = "ema",
    dtype: Annotated[
        Precision, typer.Option(help="Of UNet and text encoder; auto: bf16 where it is faster here, else fp32.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="Images at once.", min=1)] = 16,
    processes: Annotated[int | None, typer.Option(help="Processes, one a GPU; by default all GPUs.", min=1)] = None,
    grid: Annotated[bool, typer.Option(help="Also one sheet of all, grid.png, a row a prompt.")] = False,
    keep: Annotated[
        bool, typer.Option("--keep/--redraw", help="Images there that an earlier, same command drew: leave them.")
    ] = True,
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
    content_credentials: Annotated[
        bool, typer.Option("--content-credentials", help="Sign each image: a trained model made it, and which (C2PA).")
    ] = False,
    credentials_certificate: Annotated[
        Path | None, typer.Option(help="The signer's certificate chain, PEM, its own certificate first.")
    ] = None,
    credentials_key: Annotated[
        Path | None, typer.Option(help="The signer's private key, PEM, which only you may read.")
    ] = None,
    credentials_prompt: Annotated[
        bool, typer.Option("--credentials-prompt", help="Write the prompt into the signed manifest as well.")
    ] = False,
    credentials_timestamps: Annotated[
        str | None, typer.Option(help="URL of a time-stamping authority that is asked for each image; else none is.")
    ] = None,
) -> None:
    """Draw images for prompts; each has its own seed, whatever else is drawn. The same command goes on where it was."""
    from sdtrain.config.sections import SpeedConfig
    from sdtrain.formats.any_model import resolve_checkpoint
    from sdtrain.precision import torch_dtype
    from sdtrain.sampling.batch import Model
    from sdtrain.sampling.output_folder import SampleFolder
    from sdtrain.sampling.sampler import SampleSettings

    jobs, per_row = _jobs(_prompts(prompts, prompts_file, prompt_column), seed, per_prompt, seeds)
    start = _start_image(image, strength)
    settings = SampleSettings(guidance, steps, sampler, batch_size, negative_prompt, width, height, start)
    speed = SpeedConfig(compile=compile_unet)
    chosen = Model(resolve_checkpoint(model), weights, torch_dtype(resolve(dtype)), tokenizer, speed)
    _check(chosen, jobs, settings)
    signed = (credentials_certificate, credentials_key, credentials_timestamps, credentials_prompt)
    credentials = _credentials(chosen, start, content_credentials, *signed)
    folder = SampleFolder(output, chosen, settings, safety_checker, flagged, credentials=credentials).placed(jobs)
    _fill(folder, jobs, keep, processes)
    if grid:
        _write_sheet(folder, jobs, per_row if per_row > 1 else None)


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


def _prompts(named: list[str] | None, file: Path | None, column: str | None) -> list[str]:
    from sdtrain.sampling.prompts import read_prompts

    if column is not None and file is None:
        raise UserError("--prompt-column names a column of --prompts-file, which is missing.")
    wanted = [*(named or []), *(read_prompts(file, column) if file else [])]
    if not wanted:
        raise UserError("There is no prompt. Name some, or give --prompts-file.")
    return wanted


def _jobs(prompts: Sequence[str], seed: int | None, per_prompt: int | None, seeds: str | None) -> tuple[list[Job], int]:
    """The jobs, and how many of them each prompt has."""
    from sdtrain.sampling.batch import make_jobs, make_seeded_jobs
    from sdtrain.sampling.prompts import parse_seeds

    if seeds is None:
        return make_jobs(prompts, seed or 0, per_prompt or 1), per_prompt or 1
    if seed is not None or per_prompt is not None:
        raise UserError("--seeds names every prompt's seeds, so leave --seed and --per-prompt out.")
    each = parse_seeds(seeds)
    return make_seeded_jobs(prompts, each), len(each)


def _start_image(image: Path | None, strength: float | None) -> StartImage | None:
    from sdtrain.sampling.start_image import open_start_image

    if image is None:
        if strength is not None:
            raise UserError("--strength says how much of --image is redrawn, and --image is missing.")
        return None
    return open_start_image(image) if strength is None else open_start_image(image, strength)


def _credentials(
    model: Model,
    start: StartImage | None,
    wanted: bool,
    certificate: Path | None,
    key: Path | None,
    timestamps: str | None,
    prompt: bool,
) -> Credentials | None:
    from sdtrain.sampling.credentials import Credentials, describe_model
    from sdtrain.sampling.signer import SignerFiles, open_signer

    if not wanted:
        if certificate or key or timestamps or prompt:
            raise UserError("The options --credentials-... say how --content-credentials are signed; add that.")
        return None
    if certificate is None or key is None:
        raise UserError("--content-credentials are signed with --credentials-certificate FILE --credentials-key FILE.")
    signer = open_signer(SignerFiles(certificate, key, timestamps))
    credentials = Credentials(signer, describe_model(model), prompt)
    credentials.check(start)
    return credentials


def _check(model: Model, jobs: Sequence[Job], settings: SampleSettings) -> None:
    """Prints the images' size and what is cut off prompts; UserError for more steps than the sampler can take."""
    from sdtrain.formats.any_model import open_model
    from sdtrain.sampling.batch import rank_and_device
    from sdtrain.sampling.checks import check_settings, truncation_warnings

    stored = open_model(model.path, model.tokenizer, verify=False)
    remarks = [check_settings(stored, settings)]
    if stored.tokenizer is not None:
        tokenizer = stored.tokenizer()
        remarks += truncation_warnings(tokenizer, [job.prompt for job in jobs])
        remarks += truncation_warnings(tokenizer, [settings.negative_prompt], "negative prompt")
    if rank_and_device()[0] == 0:
        print(*remarks, sep="\n", file=sys.stderr)


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
    print(f"{num_drawn} images drawn, {num - num_drawn} kept")
    if check:
        what = "are black" if folder.flagged == "black" else "were not written"
        print(f"{num_flagged} of {num_drawn} images were flagged by the safety checker and {what}")


def _write_sheet(folder: SampleFolder, jobs: Sequence[Job], columns: int | None) -> None:
    from sdtrain.sampling.batch import rank_and_device, wait_for_all

    wait_for_all()
    if rank_and_device()[0] == 0:
        print(folder.write_sheet(jobs, columns))
