"""What went wrong in other trainers without any error, each held to be otherwise here.

Also: pixels that are not normalised (data/test_latents.py: moments are those of x / 127.5 - 1; the cache's info is
checked), an average that is not what is exported (test_export.py, test_train.py: it equals the formula), a schedule
that steps once a rank and a checkpoint of the first rank only (test_train_launchers.py, with two ranks).
"""

import torch

from sdtrain.config import load_config
from sdtrain.config.sections import EmaConfig
from sdtrain.formats.frozen import load_text_encoder
from sdtrain.loading.loader import BatchMaker
from sdtrain.loading.sources import open_samples
from sdtrain.models.text import tokenize
from sdtrain.training.ema import Ema
from sdtrain.training.optimizer import learning_rate
from sdtrain.training.run_dir import RunDir
from tests.training_fixtures import write_config, write_latents, write_models

SCALE = 0.35


def config_of(tmp_path, **changes):
    models = write_models(tmp_path / "models")
    data = write_latents(tmp_path / "data", models)
    return load_config(str(write_config(tmp_path / "c.yaml", models, data, **changes)))


def test_latents_are_scaled_once(tmp_path, ranks, monkeypatch):
    """mosaicml/diffusion scales cached latents a second time."""
    from sdtrain.training.state import TrainingState

    state, seen = TrainingState(config_of(tmp_path), RunDir(tmp_path / "run"), ranks), []
    batch = next(state.batches(0))
    inputs = state._objective.inputs
    monkeypatch.setattr(state._objective, "inputs", lambda *given: seen.append(given[0]) or inputs(*given))
    state.losses(batch)
    mean, logvar = batch.moments.float().chunk(2, dim=1)
    torch.testing.assert_close(seen[0] / SCALE, mean + torch.exp(0.5 * logvar) * batch.posterior)


def test_captions_are_dropped_anew_in_every_epoch(tmp_path):
    """mosaicml/diffusion drops them once and for all when it caches."""
    config = config_of(tmp_path, caption_dropout=0.5)
    tokenizer, _ = load_text_encoder(config.text_encoder)
    maker = BatchMaker(open_samples(config, SCALE), tokenizer, config, 0, 1)
    empty, dropped = tokenize(tokenizer, [""])[0], {}
    for step in range(30):  # more than four epochs
        for batch in (maker.make(step, k) for k in range(maker.accumulation)):
            for moments, token_ids in zip(batch.moments, batch.token_ids, strict=True):
                dropped.setdefault(moments.numpy().tobytes(), []).append(torch.equal(token_ids, empty))
    assert len(dropped) == 50
    assert sum(any(cases) and not all(cases) for cases in dropped.values()) > 35


def test_a_dropped_caption_is_the_encoding_of_the_empty_string_and_not_zeros(tmp_path):
    """mosaicml/diffusion (SDXL) and micro_diffusion put zeros there, which no sampler does."""
    config = config_of(tmp_path, caption_dropout=1.0)
    tokenizer, encoder = load_text_encoder(config.text_encoder)
    batch = BatchMaker(open_samples(config, SCALE), tokenizer, config, 0, 1).make(0, 0)
    context = encoder(batch.token_ids).last_hidden_state
    unconditional = encoder(tokenizer("", padding="max_length", return_tensors="pt").input_ids).last_hidden_state
    assert torch.equal(context, unconditional.expand_as(context))
    assert (unconditional != 0).all()


def test_the_rate_is_not_multiplied_by_batch_or_ranks():
    """CompVis multiplies it unless told not to (`scale_lr`); the card's 1e-4 is the rate itself."""
    config = load_config("sd-v1-3")
    assert config.accumulation(64) == 1
    assert learning_rate(10_000, config.optimizer, config.schedule) == 1e-4


def test_the_average_heeds_its_settings():
    """micro_diffusion takes EMA settings and ignores them."""
    averages = []
    for decay in (0.5, 0.9):
        weights = torch.nn.Parameter(torch.zeros(1))
        ema = Ema(weights, EmaConfig(decay=decay, warmup=False))
        torch.nn.init.ones_(weights)
        ema.update()
        averages.append(round(float(ema.average), 6))
    assert averages == [0.5, 0.1]
