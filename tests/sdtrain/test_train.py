import csv
import json
from pathlib import Path

import pytest
import torch

from sdtrain.config import load_config
from sdtrain.errors import UserError
from sdtrain.formats.any_model import open_model
from sdtrain.formats.checkpoint import find_checkpoint
from sdtrain.loading.substitutes import read_substitutes
from sdtrain.models.unet import build_unet
from sdtrain.train import parse_arguments, run, train
from sdtrain.training.run_dir import RunDir
from tests.sdtrain.plain_training import train_plainly
from tests.training_fixtures import write_config, write_latents


def config_of(tmp_path, world, **changes):
    return load_config(str(write_config(tmp_path / "config.yaml", *world, **changes)))


def losses(run_dir):
    with (run_dir / "log.csv").open() as file:
        return [(int(row["step"]), row["loss"], row["grad_norm"]) for row in csv.DictReader(file)]


def after(num_steps):
    """Asks to stop when it was asked `num_steps` times."""
    asked = iter(range(num_steps))
    return lambda: next(asked, None) is None


@pytest.mark.parametrize("changes", [{}, {"zero_stage": 2, "steps": 6}], ids=["zero1", "zero2"])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path, world, ranks, changes):
    config = config_of(tmp_path, world, **changes)
    assert train(config, RunDir(tmp_path / "straight"), ranks) == config.steps
    stopped = tmp_path / "stopped"
    assert train(config, RunDir(stopped), ranks, stop_requested=after(4)) == 4
    assert not (stopped / "DONE").exists()
    assert train(config, RunDir(stopped), ranks) == config.steps
    assert losses(stopped) == losses(tmp_path / "straight")
    assert [step for step, *_ in losses(stopped)] == list(range(1, config.steps + 1))
    files = [find_checkpoint(tmp_path / name).layout.files for name in ("straight", "stopped")]
    assert files[0] == files[1]
    done = json.loads((stopped / "DONE").read_text())
    assert done == {"step": config.steps, "checkpoint": f"checkpoints/step-{config.steps:08d}"}


def test_training_records_what_it_put_in_the_place_of_damaged_samples(tmp_path, world, ranks):
    models, _ = world
    latents = write_latents(tmp_path / "data", models, num_samples=20, samples_per_shard=10)
    (latents / "latents" / "00001.tar").write_bytes(b"cut short")
    data = {"root": str(latents), "resolution": 64, "on_corrupt": "skip"}
    config, directory = config_of(tmp_path, (models, latents), data=data), RunDir(tmp_path / "run")
    assert train(config, directory, ranks, stop_requested=after(3)) == 3
    recorded = read_substitutes(directory.substitutes)
    assert (recorded.recorded_from, recorded.full_from) == (0, None)
    steps, damaged, _, taken = recorded.rows.T
    assert {0, 1, 2} <= set(steps.tolist())
    assert int(damaged.min()) >= 10 > int(taken.max())
    # It counts substitutes that were damaged too.
    assert 0 < (steps < 3).sum() <= int(directory.log.rows()[-1]["num_substituted"])


@pytest.mark.parametrize(
    "diffusion",
    [{}, {"prediction_type": "v_prediction", "min_snr_gamma": 5.0, "offset_noise": 0.1}],
    ids=["as SD v1", "other objective"],
)
def test_training_in_fp32_equals_plain_pytorch(tmp_path, world, ranks, diffusion):
    optimizer = {"lr": 1e-3, "max_grad_norm": 0.5}
    config = config_of(tmp_path, world, precision="fp32", optimizer=optimizer, diffusion=diffusion)
    train(config, RunDir(tmp_path / "run"), ranks)
    expected, average = train_plainly(config)
    ours = [float(loss) for _, loss, _ in losses(tmp_path / "run")]
    assert ours == pytest.approx(expected, rel=2e-5)
    weights = dict(find_checkpoint(tmp_path / "run").weights("ema"))
    for name, value in average.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_checkpoint_holds_the_engines_own_weights_and_resume_refreshes_them(tmp_path, world, ranks):
    from deepspeed.utils import safe_get_full_fp32_param

    from sdtrain.training.state import TrainingState

    config = config_of(tmp_path, world)
    run_dir = RunDir(tmp_path / "run")
    train(config, run_dir, ranks)
    state = TrainingState(config, run_dir, ranks)
    assert state.checkpoints.restore() == 8
    master = dict(find_checkpoint(run_dir.path).weights("master"))
    for name, parameter in state.engine.module.named_parameters():
        assert torch.equal(safe_get_full_fp32_param(parameter), master[name])
        assert torch.equal(parameter, master[name].bfloat16())


def test_fresh_master_weights_are_not_rounded_to_bf16(tmp_path, world, ranks):
    from sdtrain.training.state import TrainingState

    config = config_of(tmp_path, world)
    state = TrainingState(config, RunDir(tmp_path / "run"), ranks)
    torch.manual_seed(config.seed)
    fresh = build_unet(config.unet, config.latent_size).state_dict()
    assert torch.equal(state.partition.master, state.partition.shard(fresh))
    assert not torch.equal(state.partition.master, state.partition.master.bfloat16().float())


def test_a_run_begins_with_raw_and_averaged_weights_of_another(tmp_path, world, ranks):
    from sdtrain.training.state import TrainingState

    first = config_of(tmp_path, world)
    train(first, RunDir(tmp_path / "first"), ranks)
    second = config_of(tmp_path, world, name="second", init_from=str(tmp_path / "first"))
    state = TrainingState(second, RunDir(tmp_path / "second"), ranks)
    assert state.checkpoints.restore() == 0
    weights = {which: dict(find_checkpoint(tmp_path / "first").weights(which)) for which in ("master", "ema")}
    assert torch.equal(state.partition.master, state.partition.shard(weights["master"]))
    assert torch.equal(state.ema.average, state.partition.shard(weights["ema"]))
    assert (state.partition.moments()["exp_avg"] == 0).all()


def test_the_average_goes_on_with_its_count_along_a_chain_of_runs(tmp_path, world, ranks):
    from sdtrain.training.state import TrainingState

    for name, steps, before in (("first", 4, None), ("second", 3, "first"), ("third", 2, "second")):
        init_from = before and str(tmp_path / before)
        train(config_of(tmp_path, world, name=name, steps=steps, init_from=init_from), RunDir(tmp_path / name), ranks)
    counts = [find_checkpoint(tmp_path / name).layout.num_ema_updates for name in ("first", "second", "third")]
    assert counts == [4, 7, 9]
    assert open_model(tmp_path / "third").average.num_updates == 9
    begun = config_of(tmp_path, world, name="fourth", init_from=str(tmp_path / "third"))
    state = TrainingState(begun, RunDir(tmp_path / "fourth"), ranks)
    state.checkpoints.restore()
    average = state.ema.average.clone()
    state.partition.load_master(state.partition.master + 1)
    state.ema.update()
    decay = (1 + 9) / (10 + 9)  # of the tenth update; anew it would be 1/10
    expected = decay * average + (1 - decay) * state.partition.master.detach()
    torch.testing.assert_close(state.ema.average, expected)


def test_an_old_checkpoint_counts_the_updates_of_its_own_run(tmp_path, world, ranks):
    train(config_of(tmp_path, world, steps=3), RunDir(tmp_path / "run"), ranks)
    path = find_checkpoint(tmp_path / "run").path / "layout.json"
    layout = json.loads(path.read_text())
    del layout["num_ema_updates"]
    layout["guard"]["num_skipped"] = 1
    path.write_text(json.dumps(layout))
    assert find_checkpoint(tmp_path / "run").layout.ema_updates == 2


def test_a_finished_run_says_so_and_goes_on_only_for_more_steps(tmp_path, world, ranks, capsys):
    config_of(tmp_path, world)
    arguments = ["--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run"), "--steps"]
    train(config_of(tmp_path, world, steps=4), RunDir(tmp_path / "run"), ranks)
    before = losses(tmp_path / "run")
    capsys.readouterr()
    run(parse_arguments([*arguments, "4"]))
    assert "is finished: 4 steps" in capsys.readouterr().out
    assert train(config_of(tmp_path, world, steps=6), RunDir(tmp_path / "run"), ranks) == 6
    assert losses(tmp_path / "run")[:4] == before


def test_going_on_with_other_settings_or_latents_is_refused(tmp_path, world, ranks):
    models, _ = world
    train(config_of(tmp_path, world, steps=2), RunDir(tmp_path / "run"), ranks)
    other = write_config(tmp_path / "other.yaml", *world, seed=7)
    with pytest.raises(UserError, match=r"run with other settings \(seed: 42 -> 7\)"):
        run(parse_arguments(["--config", str(other), "--output", str(tmp_path / "run")]))
    data = write_latents(tmp_path / "data", models, num_samples=30)
    with pytest.raises(UserError, match="trained on other latents"):
        train(config_of(tmp_path, (models, data)), RunDir(tmp_path / "run"), ranks)


def test_a_loss_that_is_not_finite_stops_with_a_sentence(tmp_path, world, ranks):
    config = config_of(tmp_path, world, optimizer={"lr": 1e30}, schedule={"warmup_steps": 0})
    with pytest.raises(UserError, match=r"The loss is (nan|inf) before step \d+. Training stopped"):
        train(config, RunDir(tmp_path / "run"), ranks)


def test_networks_that_do_not_fit_each_other_are_refused(tmp_path, world, ranks):
    config = config_of(tmp_path, world)
    wide = config.model_copy(update={"unet": config.unet.model_copy(update={"cross_attention_dim": 32})})
    with pytest.raises(UserError, match=r"gives 64 features, but unet\.cross_attention_dim is 32"):
        train(wide, RunDir(tmp_path / "run"), ranks)


def test_deepspeed_json_is_laid_over_but_cannot_change_the_batch(tmp_path, world, ranks):
    from sdtrain.training.engine import deepspeed_config

    config, extra = config_of(tmp_path, world), tmp_path / "extra.json"
    extra.write_text('{"zero_optimization": {"overlap_comm": true}}')
    settings = deepspeed_config(config, 2, 1000, extra)
    assert settings["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000, "overlap_comm": True}
    extra.write_text('{"train_batch_size": 3}')
    with pytest.raises(UserError, match="sets train_batch_size, which the training config decides"):
        deepspeed_config(config, 2, 1000, extra)


def test_output_defaults_to_the_name_of_the_run():
    arguments = parse_arguments(["--local_rank=1"])
    assert (arguments.config, arguments.output, arguments.local_rank) == ("tiny", None, 1)
    assert load_config("tiny").data.root == str(Path("demo-output/data"))
