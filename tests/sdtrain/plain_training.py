"""The same training in plain PyTorch: AdamW, DistributedDataParallel; no DeepSpeed, no partitions. An oracle.

torchrun ... tests/sdtrain/plain_training.py CONFIG OUTPUT SKIPPED_STEP
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

SCALE = 0.35


def train_plainly(config, skipped=None):
    """Mean loss of every step and the averaged weights; step `skipped` is not applied."""
    from sdtrain.diffusion import NoiseSchedule
    from sdtrain.formats.frozen import load_text_encoder
    from sdtrain.loading.loader import BatchMaker
    from sdtrain.loading.sources import open_samples
    from sdtrain.models.unet import build_unet
    from sdtrain.training.ema import ema_decay
    from sdtrain.training.optimizer import learning_rate

    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(config.seed)
    unet = build_unet(config.unet, config.latent_size)
    network = DistributedDataParallel(unet) if world_size > 1 else unet
    tokenizer, encoder = load_text_encoder(config.text_encoder)
    maker = BatchMaker(open_samples(config, SCALE), tokenizer, config, rank, world_size)
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=config.optimizer.weight_decay)
    schedule, average = NoiseSchedule(config.diffusion), {n: p.detach().clone() for n, p in unet.named_parameters()}
    means, num_updates = [], 0  # a skipped step updates nothing
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, config.optimizer, config.schedule)
        total = torch.zeros(())
        for batch in (maker.make(step, k) for k in range(maker.accumulation)):
            context = encoder(batch.token_ids).last_hidden_state
            weighted, unweighted = losses_of(network, schedule, context, batch, config)
            (weighted / maker.accumulation).backward()
            total += unweighted.detach() / maker.accumulation
        if step != skipped:
            torch.nn.utils.clip_grad_norm_(unet.parameters(), config.optimizer.max_grad_norm or torch.inf)
            optimizer.step()
            decay, num_updates = ema_decay(num_updates, config.ema), num_updates + 1
            for name, parameter in unet.named_parameters():
                average[name] = decay * average[name] + (1 - decay) * parameter.detach()
        optimizer.zero_grad()
        if world_size > 1:
            dist.all_reduce(total)
        means.append(float(total) / world_size)
    return means, average


def losses_of(network, schedule, context, batch, config):
    """Weighted and plain mean loss of a batch; for v prediction the weights are min-SNR's with gamma 5."""
    from sdtrain.diffusion import sample_posterior

    latents = sample_posterior(batch.moments, batch.posterior, SCALE)
    noisy = schedule.add_noise(latents, batch.noise, batch.timesteps)
    predicted, target, weights = network(noisy, batch.timesteps, context).sample, batch.noise, torch.ones(1)
    if config.diffusion.prediction_type == "v_prediction":
        target = schedule.velocity(latents, batch.noise, batch.timesteps)
        snr = schedule.snr[batch.timesteps]
        weights = snr.clamp(max=5.0) / (snr + 1)
    losses = F.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
    return (weights * losses).mean(), losses.mean()


def main(config_file, output, skipped):
    """Every rank trains; the first one writes what came out."""
    from sdtrain.config import load_config

    dist.init_process_group("gloo")
    means, average = train_plainly(load_config(config_file), int(skipped))
    if dist.get_rank() == 0:
        torch.save({"losses": means, "ema": average}, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
