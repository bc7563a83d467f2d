import itertools

import pytest

from sdtrain.config import changes, differences, known_configs, load_config
from sdtrain.errors import UserError


def test_configs_are_the_runs_of_the_model_card():
    card = {"sd-v1-1-256": (237_000, 256, 0.0), "sd-v1-1-512": (194_000, 512, 0.0), "sd-v1-2": (515_000, 512, 0.0)}
    card |= {"sd-v1-3": (195_000, 512, 0.1), "sd-v1-4": (225_000, 512, 0.1), "sd-v1-5": (595_000, 512, 0.1)}
    for name, (steps, resolution, dropout) in card.items():
        config = load_config(name)
        assert (config.steps, config.data.resolution, config.caption_dropout) == (steps, resolution, dropout)
        assert (config.global_batch_size, config.optimizer.lr, config.schedule.warmup_steps) == (2048, 1e-4, 10_000)
        assert config.optimizer.betas == (0.9, 0.999)
        assert (config.optimizer.weight_decay, config.optimizer.eps, config.ema.decay) == (0.01, 1e-8, 0.9999)
    assert known_configs() == sorted([*card, "tiny"])


def test_each_run_begins_with_the_weights_of_the_one_before():
    assert load_config("sd-v1-1-256").init_from is None
    chain = ["sd-v1-1-256", "sd-v1-1-512", "sd-v1-2", "sd-v1-3"]
    for earlier, later in itertools.pairwise(chain):
        assert load_config(later).init_from == f"runs/{earlier}"


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match=r"no training config 'sd-v12'. Did you mean 'sd-v1-2'\?"):
        load_config("sd-v12")


def test_unknown_key_suggests_the_nearest(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nsteps: 3\noptimizer: {learning_rat: 1}\nunet: {num_head: 4}\n")
    with pytest.raises(UserError, match=r"num_head'. Did you mean 'num_heads'"):
        load_config(str(file))


def test_a_batch_that_cannot_be_shared_names_the_nearest_that_can():
    config = load_config("sd-v1-2")
    assert config.accumulation(8) == 8
    assert config.accumulation(64) == 1
    with pytest.raises(UserError, match=r"2048 cannot be shared by 5 ranks .* global_batch_size 1920 or 2080"):
        config.accumulation(5)
    with pytest.raises(UserError, match=r"or micro_batch_size 16\."):
        config.accumulation(128)


def test_levels_of_the_unet_must_agree(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nsteps: 3\nunet: {block_out_channels: [64, 128]}\n")
    with pytest.raises(UserError, match="2 levels"):
        load_config(str(file))


def test_only_settings_that_make_another_run_count_as_differences():
    tiny = load_config("tiny")
    assert differences(tiny, tiny.model_copy(update={"steps": 9999, "log_every": 3})) == []
    slower = tiny.model_copy(update={"optimizer": tiny.optimizer.model_copy(update={"lr": 0.5})})
    assert differences(tiny, slower) == []
    assert [str(change) for change in changes(tiny, slower)] == ["optimizer.lr: 0.001 -> 0.5"]
    assert tiny.digest() != slower.digest()
    other = tiny.model_copy(update={"seed": 7})
    assert [str(change) for change in differences(tiny, other)] == ["seed: 42 -> 7"]
