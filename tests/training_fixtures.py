"""A tiny dataset of latents, VAE and text encoder for the tests of training and sampling."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from sdtrain.encode.info import NORMALISATION, VAE_KEY
from sdtrain.formats.frozen import vae_digest, vae_scaling_factor

COLORS, SHAPES = ("red", "green", "blue"), ("circle", "square")
WORDS = ["a", *COLORS, *SHAPES]


def write_models(folder: Path) -> Path:
    """A VAE, a text encoder and a tokenizer with random weights, in a diffusers folder."""
    from sdtrain.demo.train_vae import build_vae

    torch.manual_seed(0)
    vae = build_vae()
    vae.register_to_config(scaling_factor=0.35)
    vae.save_pretrained(folder / "vae")
    _write_tokenizer(folder / "tokenizer")
    _write_text_encoder(folder / "text_encoder")
    return folder


def _write_tokenizer(folder: Path) -> None:
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    symbols = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    vocab = {symbol: number for number, symbol in enumerate(symbols)}
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16).save_pretrained(folder)


def _write_text_encoder(folder: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    CLIPTextModel(config).save_pretrained(folder)


def write_latents(root: Path, models: Path, num_samples: int = 50, samples_per_shard: int = 20, side: int = 8) -> Path:
    """A dataset directory whose latents follow the contract of the encode stage."""
    folder, rng = root / "latents", np.random.default_rng(3)
    folder.mkdir(parents=True)
    for shard, first in enumerate(range(0, num_samples, samples_per_shard)):
        rows = []
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(first, min(first + samples_per_shard, num_samples)):
                rows.append(_add_sample(tar, i, rng, side))
        table = pa.Table.from_pylist(rows).replace_schema_metadata({VAE_KEY: vae_digest(str(models))})
        pq.write_table(table, folder / f"{shard:05d}.parquet", compression="zstd")
    info = {
        "schema_version": 1,
        "vae_sha256": vae_digest(str(models)),
        "scaling_factor": vae_scaling_factor(str(models)),
        "resolution": 8 * side,
        "normalisation": NORMALISATION,
        "resize": "bicubic",
        "dtype": "float16",
    }
    (folder / "info.json").write_text(json.dumps(info))
    return root


def _add_sample(tar: tarfile.TarFile, i: int, rng: np.random.Generator, side: int) -> dict:
    color, shape = COLORS[i % 3], SHAPES[i % 2]
    mean = np.full((4, side, side), (i % 3 - 1) * 2.0) + 0.1 * rng.standard_normal((4, side, side))
    moments = np.concatenate([mean, np.full((4, side, side), -6.0)]).astype(np.float16)
    file = io.BytesIO()
    np.save(file, moments)
    body = file.getvalue()
    entry = tarfile.TarInfo(f"{i:09d}.moments.npy")
    entry.size = len(body)
    tar.addfile(entry, io.BytesIO(body))
    start = tar.offset - -(-len(body) // 512) * 512 + len(body) - moments.nbytes
    return {
        "uid": f"{i:032x}",
        "key": f"{i:09d}",
        "caption": f"a {color} {shape}",
        "url": f"http://localhost/{i}.jpg",
        "offset": start,
        "num_bytes": moments.nbytes,
        "height": side,
        "width": side,
    }


def write_config(path: Path, models: Path, latents: Path, **changes: object) -> Path:
    """A config of a UNet that trains dozens of steps a second."""
    config = {
        "name": "toy",
        "vae": str(models),
        "text_encoder": str(models),
        "unet": {
            "block_out_channels": [16, 32],
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "num_heads": 2,
            "norm_num_groups": 8,
            "cross_attention_dim": 64,
        },
        "data": {"root": str(latents), "resolution": 64},
        "precision": "bf16",  # the same on every machine, and what a GPU trains in
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "steps": 8,
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 2},
        "ema": {"decay": 0.9},
        "checkpoint": {"every": 3, "keep_last": 3},
        "caption_dropout": 0.1,
        "log_every": 1,
    }
    path.write_text(yaml.safe_dump(config | changes))
    return path


def write_run(folder: Path, ema_offset: float) -> Path:
    """A run with one checkpoint, at step 5: raw weights are a fresh UNet's, the average is those plus `ema_offset`."""
    from sdtrain.config import load_config
    from sdtrain.config.sections import CheckpointConfig
    from sdtrain.formats.checkpoint import STATE, slots_of
    from sdtrain.models.unet import build_unet
    from sdtrain.training.checkpoint_writer import CheckpointStore
    from sdtrain.training.run_dir import RunDir

    models = write_models(folder / "models")
    config = load_config(str(write_config(folder / "c.yaml", models, folder / "data")))
    torch.manual_seed(0)
    unet = build_unet(config.unet, config.latent_size)
    flat = torch.cat([p.detach().reshape(-1) for p in unet.parameters()])
    state = {name: flat + ema_offset * (name == "ema") for name in STATE}
    slots = slots_of((name, p.shape) for name, p in unet.named_parameters())
    RunDir(folder / "run").begin(config, 5)
    store = CheckpointStore(folder / "run", CheckpointConfig(), 0, 1)
    store.save(5, state, config_digest="c", data_digest="d", parameters=slots)
    return folder / "run"
