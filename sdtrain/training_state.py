"""What a training run holds: networks, optimizer, average, batches; how it is made, saved and restored."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from sdtrain.checkpoint import Checkpoint, CheckpointStore, find_checkpoint
from sdtrain.config import TrainConfig
from sdtrain.data.latent_store import NORMALISATION, LatentStore, check_cache
from sdtrain.data.loader import BatchMaker, MicroBatch
from sdtrain.diffusion import NoiseSchedule
from sdtrain.ema import Ema
from sdtrain.engine import deepspeed_config, start_engine
from sdtrain.errors import UserError
from sdtrain.model import build_unet, load_text_encoder, prepare_for, vae_digest, vae_scaling_factor
from sdtrain.partition import ZeroPartition
from sdtrain.ranks import Ranks
from sdtrain.run_dir import RunDir


class TrainingState:
    """Everything that changes while training, and what it is trained with.

    Attributes:
        engine: the UNet under DeepSpeed.
        partition: this rank's part of the fp32 weights.
        ema: the average of that part.
        scaling_factor: of the VAE; applied once, when the posterior is sampled.
        accumulation: micro-batches of one optimizer step.
    """

    def __init__(self, config: TrainConfig, run_dir: RunDir, ranks: Ranks, deepspeed_json: Path | None = None):
        self._config, self._run_dir, self._ranks = config, run_dir, ranks
        self._dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.scaling_factor = vae_scaling_factor(config.vae)
        store = open_latents(config, self.scaling_factor)
        self._data_digest = store.digest
        tokenizer, text_encoder = load_text_encoder(config.text_encoder)
        _check_width(text_encoder.config.hidden_size, config)
        self._text_encoder = text_encoder.to(ranks.device, self._dtype)
        self.noise_schedule = NoiseSchedule(config.diffusion, ranks.device)
        self._batches = BatchMaker(store, tokenizer, config, ranks.rank, ranks.world_size)
        self.accumulation = self._batches.accumulation
        self._checkpoints = CheckpointStore(
            run_dir.path, config.checkpoint.keep_last, ranks.rank, ranks.world_size, ranks.group
        )
        self._start_engine(deepspeed_json)

    def _start_engine(self, deepspeed_json: Path | None) -> None:
        config, ranks = self._config, self._ranks
        torch.manual_seed(config.seed)
        unet = build_unet(config.unet, config.latent_size)
        initial = dict(unet.state_dict()) if config.init_from is None else {}
        unet = prepare_for(unet, ranks.device)
        if self._dtype is torch.bfloat16:
            unet.bfloat16()
        settings = deepspeed_config(config, self.accumulation, unet.num_parameters(), deepspeed_json)
        self.engine = start_engine(unet, config, settings)
        self.partition = ZeroPartition(self.engine, ranks.rank)
        if initial:  # DeepSpeed copied its fp32 weights from the bf16 ones
            self.partition.load_master(self.partition.cut(initial))
        self.ema = Ema(self.partition.master, config.ema)

    def predict_noise(self, noisy: torch.Tensor, timesteps: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """The UNet's epsilon for noisy latents and captions, (B, 4, h, w)."""
        with torch.no_grad():
            context = self._text_encoder(token_ids).last_hidden_state
        return self.engine(noisy.to(self._dtype), timesteps, context).sample

    def batches(self, first_step: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches from `first_step` to the end."""
        return self._batches.prefetch(first_step, self._config.steps, self._ranks.device.type == "cuda")

    def grad_norm(self) -> float:
        """Norm of the last step's gradient over all ranks, before clipping."""
        return float(self.engine.get_global_grad_norm())

    def restore(self) -> int:
        """Goes back to the newest checkpoint, or to `init_from`, or stays at the start; returns the steps done."""
        checkpoint = self._checkpoints.newest()
        if checkpoint is None:
            self._begin_from_other_run()
            return 0
        layout = checkpoint.layout
        if layout.data_digest != self._data_digest:
            raise UserError(
                f"{self._run_dir.path} was trained on other latents than {self._config.data.root} holds now. Choose "
                "another --output, or delete it to start anew."
            )
        self._check_parameters(checkpoint)
        moments = {name: self._part(checkpoint, name) for name in ("exp_avg", "exp_avg_sq")}
        self.partition.restore(self._part(checkpoint, "master"), moments, layout.step)
        self.ema.average.copy_(self._part(checkpoint, "ema"))
        return layout.step

    def _begin_from_other_run(self) -> None:
        """Takes raw and averaged weights of an earlier run; the optimizer begins anew."""
        if self._config.init_from is None:
            return
        checkpoint = find_checkpoint(Path(self._config.init_from))
        self._check_parameters(checkpoint)
        self.partition.load_master(self._part(checkpoint, "master"))
        self.ema.average.copy_(self._part(checkpoint, "ema"))

    def _part(self, checkpoint: Checkpoint, name: str) -> torch.Tensor:
        start = self.partition.start
        return checkpoint.read(name, start, start + self.partition.master.numel())

    def _check_parameters(self, checkpoint: Checkpoint) -> None:
        if checkpoint.layout.parameters != self.partition.slots:
            raise UserError(f"{checkpoint.path} holds another UNet than the config's `unet` describes.")

    def begin(self, step: int) -> float:
        """Opens the run directory for writing at `step`; returns the seconds trained before."""
        seconds = self._run_dir.begin(self._config, step) if self._ranks.is_first else 0.0
        if self._ranks.is_first:
            print(self._headline(step), flush=True)
        return seconds

    def _headline(self, step: int) -> str:
        config, ranks = self._config, self._ranks
        device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else platform.machine()
        return (
            f"{config.name}: {self.engine.module.num_parameters():,} parameters, {len(self._batches):,} latents, "
            f"{ranks.world_size} x {device}, batch {config.global_batch_size} = {ranks.world_size} ranks x "
            f"{self.accumulation} micro-steps x {config.micro_batch_size}, ZeRO-{config.zero_stage}, "
            f"{config.precision}, from step {step} to {config.steps}, output {self._run_dir.path}"
        )

    def save(self, step: int) -> Path:
        """Writes a checkpoint after `step` optimizer steps. All ranks take part."""
        return self._checkpoints.save(
            step,
            {"master": self.partition.master, "ema": self.ema.average} | self.partition.moments(),
            config_digest=self._config.digest(),
            data_digest=self._data_digest,
            parameters=self.partition.slots,
        )

    def finish(self, step: int, first_step: int) -> None:
        """Writes the last checkpoint, and DONE if the run reached its end."""
        checkpoint = self.save(step) if step > first_step else None
        is_done = step >= self._config.steps
        if is_done and self._ranks.is_first:
            newest = checkpoint or find_checkpoint(self._run_dir.path).path
            self._run_dir.finish(step, newest)
        if self._ranks.is_first:
            print(f"{'finished' if is_done else 'stopped'} at step {step}: {self._run_dir.path}", flush=True)


def open_latents(config: TrainConfig, scaling_factor: float) -> LatentStore:
    """The config's latents, checked against its VAE and resolution.

    Raises:
        UserError: no latents, or others than the config assumes.
    """
    root = Path(config.data.root)
    store = LatentStore(root, config.data.resolution)
    expected = {
        "vae_sha256": vae_digest(config.vae),
        "resolution": config.data.resolution,
        "scaling_factor": scaling_factor,
        "normalisation": NORMALISATION,
    }
    check_cache(store.info, expected, root / "latents")
    store.check_shards()
    return store


def _check_width(width: int, config: TrainConfig) -> None:
    if width != config.unet.cross_attention_dim:
        raise UserError(
            f"The text encoder '{config.text_encoder}' gives {width} features, but unet.cross_attention_dim is "
            f"{config.unet.cross_attention_dim}. Set one to the other."
        )
