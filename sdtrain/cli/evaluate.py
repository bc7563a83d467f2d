"""`sdtrain evaluate`: FID against CLIP score over guidance scales."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sdtrain.cli.output import print_table
from sdtrain.errors import UserError
from sdtrain.precision import Precision

# Imports of our own code are inside the commands, so that a help text does not wait for torch.


def evaluate(
    models: Annotated[list[Path], typer.Argument(help="Runs, checkpoints, diffusers folders or CompVis files.")],
    reference: Annotated[
        str, typer.Option(help="Real images: a dataset (s3://… too), a folder, or an .npz of statistics.")
    ],
    prompts: Annotated[Path, typer.Option(help="Text file with one prompt a line, or COCO's captions (.json).")],
    output: Annotated[Path | None, typer.Option(help="By default `evaluation` in a run's folder.")] = None,
    num: Annotated[int, typer.Option(help="Prompts, and images for each scale.", min=2)] = 10_000,
    scales: Annotated[str, typer.Option(help="Guidance scales.")] = "1.5,2,3,4,5,6,7,8",
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 50,
    sampler: Annotated[Literal["plms", "ddim", "dpm"], typer.Option(help="The sampler.")] = "plms",
    seed: Annotated[int, typer.Option(help="Of the first image; each next one has the next.", min=0)] = 0,
    weights: Annotated[Literal["ema", "raw"], typer.Option(help="Averaged weights, or raw ones.")] = "ema",
    dtype: Annotated[
        Precision, typer.Option(help="Of the UNet; auto: as the evaluation began, or bf16 where it is faster here.")
    ] = "auto",
    tokenizer: Annotated[str | None, typer.Option(help="For a CompVis file: folder, hub id or `demo`.")] = None,
    network: Annotated[Literal["inception", "demo"], typer.Option(help="Whose features FID compares.")] = "inception",
    network_weights: Annotated[str, typer.Option(help="Inception's weights, by name or file.")] = "inception-fid",
    resize: Annotated[
        Literal["pytorch-fid", "torch-fidelity", "clean-fid"], typer.Option(help="How Inception gets its 299 pixels.")
    ] = "pytorch-fid",
    reference_view: Annotated[
        Literal["as_samples", "as_is"], typer.Option(help="Real images cropped to the samples' size, or as they are.")
    ] = "as_samples",
    num_reference: Annotated[int, typer.Option(help="Real images, at most.", min=2)] = 50_000,
    agreement: Annotated[
        Literal["clip", "demo", "none"], typer.Option(help="Compare with prompts by CLIP, or the demo's checker.")
    ] = "clip",
    clip_model: Annotated[str, typer.Option(help="An open_clip model.")] = "ViT-L-14-quickgelu",
    clip_weights: Annotated[str, typer.Option(help="Its weights: open_clip's tag, or a file.")] = "openai",
    cmmd: Annotated[bool, typer.Option("--cmmd", help="Also compare CLIP's embeddings of the images.")] = False,
    batch_size: Annotated[int, typer.Option(help="Images drawn at once.", min=1)] = 16,
    part_size: Annotated[int, typer.Option(help="Images in a part, which is kept as a whole.", min=2)] = 256,
    processes: Annotated[int | None, typer.Option(help="Processes; by default one a GPU.", min=1)] = None,
) -> None:
    """Draw images over guidance scales and measure them; started again, it goes on where it was."""
    from sdtrain.evaluation.protocol import Protocol
    from sdtrain.evaluation.results import protocol_lines, table_of
    from sdtrain.evaluation.sweep import plan
    from sdtrain.evaluation.workers import run_sweep
    from sdtrain.sampling.batch import all_devices
    from sdtrain.settings import parse_settings

    given: dict[str, Any] = {
        "prompts": str(prompts),
        "num_prompts": num,
        "reference": reference,
        "num_reference": num_reference,
        "reference_view": reference_view,
        "scales": parse_scales(scales),
        "num_steps": steps,
        "sampler": sampler,
        "seed": seed,
        "weights": weights,
        "dtype": dtype,
        "tokenizer": tokenizer,
        "batch_size": batch_size,
        "part_size": part_size,
        "network": network,
        "network_weights": network_weights,
        "resize": resize,
        "agreement": agreement,
        "clip_model": clip_model,
        "clip_weights": clip_weights,
        "cmmd": cmmd,
    }
    num_processes = len(all_devices(processes))
    sweep = plan(parse_settings(Protocol, given, "command line"), models, output)
    results = run_sweep(sweep, num_processes, lambda line: print(line, flush=True))
    print(*protocol_lines(results), sep="\n")
    print_table(table_of(results))
    print(*(path for path in (sweep.directory.results, sweep.directory.curve) if path.exists()), sep="\n")


def parse_scales(text: str) -> tuple[float, ...]:
    """Guidance scales from "1.5,2,3".

    Raises:
        UserError: they are no numbers.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--scales '{text}': write numbers with commas between them, as in 1.5,2,3.") from error
