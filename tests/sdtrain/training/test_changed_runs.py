"""A stopped run goes on with other settings, as far as they do not change its samples, and says since when."""

import json

import pytest
import yaml

import sdtrain.config
from sdtrain.config import MAY_CHANGE, TrainConfig, changes, load_config
from sdtrain.config.resuming import Added, Free, OnResume, Tunable, defaults_of_added, rules_of
from sdtrain.config.sections import OptimizerConfig
from sdtrain.errors import UserError
from sdtrain.formats.checkpoint import find_checkpoint
from sdtrain.settings import Settings, load_settings
from sdtrain.train import configure, train
from sdtrain.training.optimizer import learning_rate
from sdtrain.training.run_dir import RunDir
from tests.sdtrain.launching import log_of
from tests.training_fixtures import write_config


def config_of(tmp_path, world, **changed):
    return load_config(str(write_config(tmp_path / "config.yaml", *world, **changed)))


def go_on(config, run_dir, ranks, to):
    """As sdtrain/train.py does it: asks whether the settings fit, and trains up to a step."""
    config = config.model_copy(update={"steps": to})
    run_dir.check_config(config)
    train(config, run_dir, ranks)


def recorded(run_dir):
    return [(entry.step, [str(change) for change in entry.changes]) for entry in run_dir.history()]


CHANGES = {
    "optimizer": {"lr": 5e-4, "betas": [0.8, 0.99], "weight_decay": 0.1, "eps": 1e-7, "max_grad_norm": 1.0},
    "schedule": {"warmup_steps": 1, "decay": "cosine", "decay_steps": 20},
    "ema": {"decay": 0.8},
    "guard": {"on_nonfinite": "skip", "max_grad_norm_ratio": 50.0, "norm_window": 2},
    "checkpoint": {"every": 1, "keep_last": 2, "mode": "sync"},
    "validation": {"every": 3},
    "speed": {"fused_adamw": False, "attention": "sdpa"},
    "zero_stage": 2,
    "micro_batch_size": 2,
    "log_every": 1,
    "name": "renamed",
    "precision": "fp32",
}


def test_a_run_goes_on_from_its_checkpoint_with_all_that_may_change(tmp_path, world, ranks, capsys):
    run_dir, straight = RunDir(tmp_path / "run"), RunDir(tmp_path / "straight")
    old = config_of(tmp_path, world)
    go_on(old, run_dir, ranks, 4)
    go_on(old, straight, ranks, 5)
    capsys.readouterr()
    new = config_of(tmp_path, world, **CHANGES)
    go_on(new, run_dir, ranks, 6)
    printed = capsys.readouterr().out
    assert log_of(run_dir.path)[:4] == log_of(straight.path)[:4]
    # The fifth step begins with the weights of the checkpoint and sees the same samples, now in another precision.
    assert float(log_of(run_dir.path)[4]) == pytest.approx(float(log_of(straight.path)[4]), rel=2e-2)
    rates = [learning_rate(step, new.optimizer, new.schedule) for step in (4, 5)]
    assert log_of(run_dir.path, "lr")[4:] == [str(rate) for rate in rates]
    assert find_checkpoint(run_dir.path).layout.step == 6
    assert load_settings(TrainConfig, run_dir.path / "config.yaml") == new.model_copy(update={"steps": 6})
    ((step, names),) = recorded(run_dir)
    assert step == 4
    for text in ("optimizer.lr: 0.001 -> 0.0005", "ema.decay: 0.9 -> 0.8", "zero_stage: 1 -> 2", "steps: 4 -> 6"):
        assert text in names
        assert f"changed from step 4 on: {text}\n" in printed
    assert "precision: bf16 -> fp32" in names


def test_what_was_changed_in_between_is_kept_in_order_and_nothing_is_recorded_without_a_change(tmp_path, world):
    run_dir = RunDir(tmp_path / "run")

    def begin(step, lr):
        config = config_of(tmp_path, world, optimizer={"lr": lr})
        made = run_dir.record_changes(config, step)
        run_dir.begin(config, step)
        return made

    assert [len(begin(step, lr)) for step, lr in ((0, 1e-3), (5, 1e-3), (7, 5e-4), (9, 5e-4), (12, 1e-4))] == [
        0, 0, 1, 0, 1,
    ]  # fmt: skip
    expected = ["optimizer.lr: 0.001 -> 0.0005", "optimizer.lr: 0.0005 -> 0.0001"]
    assert recorded(run_dir) == [(7, expected[:1]), (12, expected[1:])]
    begin(10, 1e-4)  # the checkpoint at step 12 was damaged
    assert recorded(run_dir) == [(7, expected[:1]), (10, expected[1:])]


def test_a_kill_between_the_record_and_the_config_leaves_one_entry(tmp_path, world):
    run_dir = RunDir(tmp_path / "run")
    run_dir.begin(config_of(tmp_path, world), 0)
    changed = config_of(tmp_path, world, optimizer={"lr": 1e-4})
    for _ in range(2):
        assert len(run_dir.record_changes(changed, 6)) == 1
    assert recorded(run_dir) == [(6, ["optimizer.lr: 0.001 -> 0.0001"])]


@pytest.mark.parametrize(
    ("changed", "name", "why"),
    [
        ({"seed": 7}, "seed", "which samples, captions and noise a step sees"),
        ({"global_batch_size": 16}, "global_batch_size", "which samples"),
        ({"caption_dropout": 0.2}, "caption_dropout", "which samples"),
        ({"validation": {"num_samples": 4}}, r"validation\.num_samples", "which samples"),
        ({"diffusion": {"offset_noise": 0.1}}, r"diffusion\.offset_noise", "which samples"),
        ({"diffusion": {"prediction_type": "v_prediction"}}, r"diffusion\.prediction_type", "what the network learns"),
        ({"diffusion": {"min_snr_gamma": 5.0}}, r"diffusion\.min_snr_gamma", "what the network learns to predict"),
        ({"text_encoder": "demo"}, "text_encoder", "which network is trained, or what it is trained on"),
        ({"vae": "demo"}, "vae", "which network is trained, or what it is trained on"),
        ({"unet": {"cross_attention_dim": 32}}, r"unet\.cross_attention_dim", "which network is trained"),
    ],
    ids=str,
)
def test_what_a_run_keeps_for_life_is_refused_with_the_reason_and_what_may_change(tmp_path, world, changed, name, why):
    old = config_of(tmp_path, world)
    run_dir = RunDir(tmp_path / "run")
    run_dir.begin(old, 0)
    section, value = next(iter(changed.items()))
    inside = getattr(old, section)
    value = inside.model_dump() | value if isinstance(value, dict) else value
    new = config_of(tmp_path, world, **{section: value})
    with pytest.raises(UserError, match=rf"\({name}: .* -> .*{name} decides {why}.* may change: .*optimizer, schedule"):
        run_dir.check_config(new)


@pytest.mark.parametrize("name", ["resolution", "shuffle", "window_shards", "bucket_group", "online_vae"])
def test_the_order_and_the_size_of_samples_are_kept(tmp_path, world, name):
    run_dir, old = RunDir(tmp_path / "run"), config_of(tmp_path, world)
    run_dir.begin(old, 0)
    other = {"resolution": 128, "shuffle": "blocks", "window_shards": 2, "bucket_group": 4, "online_vae": True}[name]
    new = old.model_copy(update={"data": old.data.model_copy(update={name: other})})
    with pytest.raises(UserError, match=rf"data\.{name}: .*data\.{name} decides which samples"):
        run_dir.check_config(new)


def test_precision_changes_only_where_the_config_names_it(tmp_path, world):
    run_dir, file = RunDir(tmp_path / "run"), tmp_path / "config.yaml"
    run_dir.begin(config_of(tmp_path, world, precision="fp32"), 3)
    for precision, expected in (("auto", "fp32"), ("bf16", "bf16")):
        write_config(file, *world, precision=precision)
        config = configure(str(file), data="elsewhere", steps=9)
        run_dir.check_config(config)
        assert run_dir.with_kept_precision(config).precision == expected
    file.write_text("\n".join(line for line in file.read_text().splitlines() if not line.startswith("precision")))
    unnamed = configure(str(file), data="elsewhere", steps=9)
    assert run_dir.with_kept_precision(unnamed).precision == "fp32", "a default is no request"
    assert "precision (if the config names it)" in MAY_CHANGE


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_every_setting_says_what_may_become_of_it():
    class Section(Settings):
        told: Free[int] = 1
        untold: int = 2

    class Whole(Settings):
        section: Section = Section()
        optimizer: OptimizerConfig = OptimizerConfig()

    with pytest.raises(TypeError, match=r"Section\.untold does not say what may become of it when a run goes on"):
        rules_of(Whole)
    config = load_config("tiny")
    settings = {change.name for change in changes(_other_values(config), config)}
    assert settings == set(rules_of(TrainConfig))


def _other_values(model):
    """A config that differs in every setting; its values need not make sense."""
    update = {
        name: _other_values(value) if isinstance(value, Settings) else "another"
        for name, value in ((name, getattr(model, name)) for name in type(model).model_fields)
    }
    return model.model_copy(update=update)


def test_digests_are_those_of_runs_from_before_settings_said_it_themselves():
    expected = {
        "sd-v1-2": "a8647279aca3858ac06f8b92a0556018fd62ca4901ce7a1072e2b5b0165f29bf",
        "sd-v1-1-256": "8cff0c96bd2af9e29b998b078e98c2c12390b638b89f1b04498c94c431a3c32a",
    }
    for name, digest in expected.items():  # their default precision was bf16
        assert load_config(name).model_copy(update={"precision": "bf16"}).digest() == digest


def test_a_new_setting_changes_the_digest_only_where_it_is_used(monkeypatch):
    class Section(Settings):
        sizes: Added[Tunable[tuple[int, ...]]] = (1, 2)
        told: Free[int] = 1

    class Whole(Settings):
        section: Section = Section()

    assert defaults_of_added(Whole) == {"section.sizes": [1, 2]}
    assert rules_of(Whole)["section.sizes"] is OnResume.TUNES
    config = load_config("tiny")
    before, added = config.digest(), sdtrain.config._ADDED
    monkeypatch.setattr(sdtrain.config, "_ADDED", added | {"caption_dropout": config.caption_dropout})
    without = config.digest()
    monkeypatch.setattr(sdtrain.config, "_ADDED", added | {"caption_dropout": 0.77})
    assert without != before
    assert config.digest() == before


def test_a_run_folder_from_before_goes_on_bit_for_bit(tmp_path, world, ranks):
    config, old, straight = config_of(tmp_path, world), RunDir(tmp_path / "old"), RunDir(tmp_path / "straight")
    go_on(config, straight, ranks, 8)
    go_on(config, old, ranks, 3)
    content = yaml.safe_load((old.path / "config.yaml").read_text())
    del content["speed"]["deterministic"]
    (old.path / "config.yaml").write_text(yaml.safe_dump(content))
    layout = find_checkpoint(old.path).path / "layout.json"
    fields = json.loads(layout.read_text())
    assert fields.pop("num_ema_updates") == 3
    layout.write_text(json.dumps(fields | {"config_digest": "of another version"}))
    go_on(config, old, ranks, 8)
    assert log_of(old.path) == log_of(straight.path)
    layouts = [find_checkpoint(run_dir.path).layout for run_dir in (old, straight)]
    assert layouts[0] == layouts[1]
