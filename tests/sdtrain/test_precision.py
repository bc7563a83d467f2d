import math

import pytest
import torch
import yaml

from filters.recipe import Recipe, ScoreConfig
from filters.recipe_record import record_recipe, with_precision
from sdtrain import precision
from sdtrain.config import load_config
from sdtrain.dataset.config import EncodeConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.precision import Speedup, choose, resolve, warning_if_slow
from sdtrain.sampling.batch import Model
from sdtrain.train import train
from sdtrain.training.run_dir import RunDir
from tests.training_fixtures import write_config

WITHOUT_UNITS = Speedup(product=0.46 / 61, convolution=0.01)  # an AMD EPYC with AVX2 only
WITH_UNITS = Speedup(product=1.8, convolution=1.6)  # one with avx512_bf16


@pytest.fixture
def cpu(monkeypatch):
    """Sets what measuring the CPU gives."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def set_to(speedup):
        monkeypatch.setattr(precision, "cpu_speedup", lambda: speedup)

    return set_to


@pytest.mark.parametrize(
    ("speedup", "expected"),
    [
        (WITHOUT_UNITS, "fp32"),
        (WITH_UNITS, "bf16"),
        (Speedup(product=2.5, convolution=0.8), "fp32"),
        (Speedup(product=0.42, convolution=0.41), "fp32"),
        (Speedup(product=1.02, convolution=1.03), "fp32"),
        (Speedup(product=1.0, convolution=1.5), "bf16"),
    ],
)
def test_a_cpu_gets_bf16_where_both_products_and_convolutions_are_measured_to_be_faster(speedup, expected):
    assert choose("cpu", lambda: speedup).precision == expected


@pytest.mark.parametrize(("has_units", "expected"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_gets_bf16_if_it_has_the_units_and_does_not_emulate_them(monkeypatch, has_units, expected):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_units
    )
    assert choose("cuda:0", lambda: pytest.fail("GPUs are not measured")).precision == expected


def test_measuring_leaves_random_numbers_and_threads_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    with torch.inference_mode():
        speedup = precision.cpu_speedup.__wrapped__()
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in (speedup.product, speedup.convolution))


def test_a_measurement_that_shows_a_hopeless_ratio_ends_early(monkeypatch):
    widths = []

    def make(dtype, side):
        widths.append(side)
        return lambda: None

    ticks = iter([0.0, 1.0, 0.0, 100.0] * 2)  # begins and ends of fp32, of bf16
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(ticks))
    assert precision._ratio(make) == 0.01
    assert set(widths) == {precision._SMALL}


@pytest.mark.parametrize(
    ("chosen", "speedup", "warns"),
    [
        ("bf16", WITHOUT_UNITS, True),
        ("fp16", WITHOUT_UNITS, True),
        ("fp32", WITHOUT_UNITS, False),
        ("bf16", WITH_UNITS, False),
    ],
)
def test_who_asks_for_halves_that_are_slow_is_told(chosen, speedup, warns):
    warning = warning_if_slow(chosen, "cpu", lambda: speedup)
    assert bool(warning) == warns
    assert not warns or "0.0075" in warning


@pytest.mark.parametrize(("speedup", "expected"), [(WITHOUT_UNITS, "fp32"), (WITH_UNITS, "bf16")])
def test_a_run_says_what_auto_chose_and_keeps_it_elsewhere(tmp_path, world, ranks, cpu, capsys, speedup, expected):
    def config(steps):
        changes = {"precision": "auto", "steps": steps}
        return load_config(str(write_config(tmp_path / "c.yaml", *world, **changes)))

    run = RunDir(tmp_path / "run")
    cpu(speedup)
    train(config(1), run, ranks)
    said = capsys.readouterr().out
    assert f"precision {expected} (auto): on this CPU in bf16 products run at" in said
    assert f"ZeRO-1, {expected}, from step 0" in said
    assert yaml.safe_load((run.path / "config.yaml").read_text())["precision"] == expected

    cpu(WITH_UNITS if speedup is WITHOUT_UNITS else WITHOUT_UNITS)
    run.check_config(config(2))
    train(config(2), run, ranks)
    said = capsys.readouterr().out
    assert f"ZeRO-1, {expected}, from step 1" in said
    assert ("warning: precision bf16 is slow here" in said) == (expected == "bf16")


def test_the_tiny_config_chooses_and_sd_v1_is_bf16_on_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert load_config("tiny").precision == "auto"
    assert {
        resolve(load_config(f"sd-v1-{name}").precision, "cuda") for name in ("1-256", "1-512", "2", "3", "4", "5")
    } == {"bf16"}


@pytest.mark.parametrize(
    ("speedup", "score", "encode"), [(WITHOUT_UNITS, "float32", "fp32"), (WITH_UNITS, "bf16", "bf16")]
)
def test_a_dataset_keeps_what_it_was_begun_in(tmp_path, cpu, speedup, score, encode):
    recipe = Recipe(name="r", score=ScoreConfig(dtype="auto"), encode=EncodeConfig(precision="auto"))
    recipe = recipe.model_copy(update={"select": recipe.select.model_copy(update={"metadata": "x"})})
    dataset = DatasetDir(tmp_path)
    cpu(speedup)
    settled = with_precision(dataset, recipe)
    assert (settled.score.dtype, settled.encode.precision) == (score, encode)
    record_recipe(dataset, settled)
    cpu(WITH_UNITS if speedup is WITHOUT_UNITS else WITHOUT_UNITS)
    assert with_precision(dataset, recipe) == settled
    assert record_recipe(dataset, with_precision(dataset, recipe)) == []


@pytest.mark.parametrize(("speedup", "dtype"), [(WITHOUT_UNITS, torch.float32), (WITH_UNITS, torch.bfloat16)])
def test_samples_are_drawn_in_what_is_fast_here(tmp_path, cpu, speedup, dtype):
    cpu(speedup)
    assert Model(tmp_path).dtype == dtype
