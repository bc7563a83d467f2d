"""Builds and holds the state of a training run: networks, optimizer, average, batches."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch

from sdtrain.config import TrainConfig
from sdtrain.diffusion import sample_posterior
from sdtrain.encode.text import embed_empty
from sdtrain.formats.frozen import load_text_encoder, load_vae, vae_scaling_factor
from sdtrain.loading.loader import BatchMaker, MicroBatch
from sdtrain.loading.sources import open_samples, sample_record
from sdtrain.loading.substitutes import SubstituteLog
from sdtrain.models.backends import attention_kernels, begin_graphs, compile_unet, set_backends
from sdtrain.models.schedulers import sampling_scheduler
from sdtrain.models.unet import build_unet, memory_format, prepare_for
from sdtrain.precision import decoder_dtype, torch_dtype
from sdtrain.preflight.networks import require_width
from sdtrain.sampling.sampler import Networks, place_decoder
from sdtrain.training.checkpointing import CheckpointManager
from sdtrain.training.distributed import Ranks
from sdtrain.training.ema import Ema
from sdtrain.training.engine import deepspeed_config, needs_deepspeed_steps, start_engine
from sdtrain.training.guards import StepGuard
from sdtrain.training.loss import Objective
from sdtrain.training.run_dir import RunDir
from sdtrain.training.steps import DeepSpeedSteps, FlatSteps, Steps
from sdtrain.training.throughput import StepMetrics
from sdtrain.training.validation import Validation
from sdtrain.training.zero_partition import ZeroPartition


class TrainingState:
    """The network in training, and everything it is trained with.

    Attributes:
        engine: the UNet under ZeRO, and its optimizer steps.
        partition, ema: this rank's part of the fp32 weights, and its average.
        scaling_factor: of the VAE; applied once, in `losses`.
        accumulation: micro-batches of one optimizer step.
        guard: decides which optimizer steps are applied.
        checkpoints: saves and restores it.
        num_repeated: optimizer steps repeated because their gradients overflowed (fp16 only).
    """

    def __init__(self, config: TrainConfig, run_dir: RunDir, ranks: Ranks, deepspeed_json: Path | None = None):
        self._config, self._run_dir, self._ranks = config, run_dir, ranks
        self._dtype = torch_dtype(config.precision)
        set_backends(config.speed)
        self.scaling_factor = vae_scaling_factor(config.vae)
        store = self._store = open_samples(config, self.scaling_factor)
        tokenizer, text_encoder = load_text_encoder(config.text_encoder)
        self._tokenizer = tokenizer
        self.num_repeated = 0
        require_width(config.text_encoder, text_encoder.config.hidden_size, config.unet.cross_attention_dim)
        empty = embed_empty(tokenizer, text_encoder, ranks.device, store.text_dtype) if store.text_dtype else None
        is_needed = store.text_dtype is None or config.previews.every
        self._text_encoder = text_encoder.to(ranks.device if is_needed else "cpu", self._dtype)
        self._objective = Objective(config.diffusion, ranks.device)
        self._batches = BatchMaker(store, tokenizer, config, ranks.rank, ranks.world_size, empty)
        self.accumulation = self._batches.accumulation
        self.guard = StepGuard(config.guard)
        self._start_engine(deepspeed_json)
        self.checkpoints = CheckpointManager(config, run_dir, ranks, store, self.partition, self.ema, self.guard)

    def _start_engine(self, deepspeed_json: Path | None) -> None:
        config, ranks = self._config, self._ranks
        torch.manual_seed(config.seed)
        unet = build_unet(config.unet, config.latent_size)
        initial = dict(unet.state_dict()) if config.init_from is None else {}
        unet = prepare_for(unet, ranks.device, config.speed, for_training=True)
        torch.nn.Module.to(unet, self._dtype)  # diffusers' own `to` warns of float32 modules, of which there are none
        compile_unet(unet, config.speed)
        settings = deepspeed_config(config, self.accumulation, unet.num_parameters(), deepspeed_json)
        engine = start_engine(unet, config, settings)
        self.partition = ZeroPartition(engine, ranks.rank)
        if initial:  # DeepSpeed made its fp32 weights from the rounded ones
            self.partition.load_master(self.partition.shard(initial))
        self.ema = Ema(self.partition.master, config.ema)
        kind = DeepSpeedSteps if needs_deepspeed_steps(config, deepspeed_json) else FlatSteps
        self.engine: Steps = kind(engine, self.partition, self.ema, self.guard, config)

    def losses(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples z_0, adds noise, predicts and compares: each sample's weighted and unweighted loss, (B,), float32."""
        latents = sample_posterior(batch.moments, batch.posterior, self.scaling_factor)
        noisy, target = self._objective.inputs(latents, batch.noise, batch.timesteps)
        predicted = self.predict(noisy, batch.timesteps, self._context(batch))
        return self._objective.losses(predicted, target, batch.timesteps)

    def _context(self, batch: MicroBatch) -> torch.Tensor:
        """The captions' embeddings, (B, L, width), read or encoded."""
        if batch.context is not None:
            return batch.context.to(self._dtype)
        with torch.no_grad():
            encoded: torch.Tensor = self._text_encoder(batch.token_ids).last_hidden_state
        return encoded

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """The UNet's prediction, noise or velocity as configured, (B, 4, h, w)."""
        begin_graphs(self._config.speed)
        with attention_kernels(self._config.speed):
            layout = memory_format(self._ranks.device, self._config.speed)
            inputs = noisy.to(self._dtype, memory_format=layout)
            predicted: torch.Tensor = self.engine(inputs, timesteps, context).sample
        return predicted

    def validation(self) -> Validation:
        """The held-out samples."""
        return Validation(self._config, self._batches, self._ranks)

    def validation_losses(self, batch: MicroBatch) -> torch.Tensor:
        """Each sample's unweighted loss, (B,), without gradients."""
        size = len(batch.moments) if self._config.speed.compile == "off" else self._config.micro_batch
        with torch.no_grad():
            return self.losses(batch.filled(size))[1][: len(batch.moments)]

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Replaces the weights by their average inside the block. All ranks take part."""
        weights = self.partition.master.detach().clone()
        self.partition.load_master(self.ema.average)
        try:
            yield
        finally:
            self.partition.load_master(weights)

    def networks(self) -> Networks:
        """The networks that sample previews: the UNet in training, and the VAE, which training itself does not need."""
        device, speed = self._ranks.device, self._config.speed
        return Networks(
            unet=self.engine.module,
            vae=place_decoder(load_vae(self._config.vae), device, decoder_dtype(self._dtype, device), speed),
            tokenizer=self._tokenizer,
            text_encoder=self._text_encoder,
            scheduler_config=sampling_scheduler(self._config.diffusion).config,
            latent_size=self._config.latent_size,
            dtype=self._dtype,
            source=str(self._run_dir.path),
            speed=speed,
            num_rows=self._config.micro_batch,
        )

    def batches(self, first_step: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches from `first_step` to the end; the run records what replaces damaged samples."""
        config, ranks = self._config, self._ranks
        may_skip = config.data.on_corrupt == "skip"
        log = SubstituteLog(self._run_dir.substitutes, ranks.rank, ranks.world_size, first_step, may_skip)
        return self._batches.prefetch(first_step, config.steps, ranks.device.type == "cuda", log)

    def micro_batches(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches of one optimizer step, on the device.

        In fp16 they are repeated with a smaller loss scale while their gradients overflow. DeepSpeed then leaves the
        weights unchanged, so no sample is lost, and sample plan, learning rate, average and Adam stay in step.
        UserError if the gradients are not finite at any scale.
        """
        mine = (batch.to(self._ranks.device) for batch in islice(batches, self.accumulation))
        if self._config.precision != "fp16":
            yield from mine
            return
        kept = list(mine)
        yield from kept
        while self.guard.must_repeat:
            self.num_repeated += 1
            yield from kept

    def metrics(self, lr: float) -> StepMetrics:
        """Metrics of the last step, which had the learning rate `lr`."""
        return StepMetrics(lr, self.grad_norm(), self.guard.state.num_skipped, self._batches.num_substituted)

    def grad_norm(self) -> float:
        """Norm of the last step's gradient over all ranks, before clipping; NaN where it was not finite."""
        if self.guard.norm is not None:
            return self.guard.norm
        norm = self.engine.grad_norm()
        return norm if math.isfinite(norm) and norm >= 0 else math.nan  # DeepSpeed says infinity, or -1

    def step_was_applied(self, step: int) -> bool:
        """Whether the guard applied optimizer step `step`; if not, the first rank prints why.

        UserError if the guard's policy is to stop.
        """
        if (message := self.guard.after_step(step)) and self._ranks.is_first:
            print(f"warning: {message}", flush=True)
        return self.guard.applied

    def begin(self, step: int) -> float:
        """Opens the run directory for writing at `step`; returns the seconds trained before."""
        if not self._ranks.is_first:
            return 0.0
        changes = self._run_dir.record_changes(self._config, step)
        seconds = self._run_dir.begin(self._config, step)
        if not step or not self._run_dir.samples.exists():
            record = sample_record(self._store, self._config, self.checkpoints.origin)
            record.write(self._run_dir.samples)
        print(self._headline(step), flush=True)
        for change in changes:
            print(f"changed from step {step} on: {change}", flush=True)
        return seconds

    def _headline(self, step: int) -> str:
        config, ranks = self._config, self._ranks
        device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else platform.machine()
        return (
            f"{config.name}: {self.engine.module.num_parameters():,} parameters, {len(self._batches):,} latents, "
            f"{ranks.world_size} x {device}, batch {config.global_batch_size} = {ranks.world_size} ranks x "
            f"{self.accumulation} micro-steps x {config.micro_batch}, ZeRO-{config.zero_stage}, "
            f"{config.precision}, from step {step} to {config.steps}, output {self._run_dir.path}"
        )
