"""The command that hands models on in the formats of others, and takes them from there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


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
) -> None:
    """Write a model as a diffusers folder or as a CompVis file; either can be read again, here and elsewhere."""
    from sdtrain.formats.export import ExportSettings, export_model

    print(export_model(model, output, ExportSettings(weights, dtype, tokenizer)))
