import csv

import numpy as np
import pytest

from sdtrain.errors import UserError
from sdtrain.evaluation import metrics
from sdtrain.evaluation.distances import Gaussian
from sdtrain.evaluation.features.metrics import FeatureMetric
from sdtrain.evaluation.metrics import (
    METRICS,
    ImageArrays,
    arrays_needed,
    axes_of,
    descriptions,
    numbers,
    open_metrics,
)
from sdtrain.evaluation.results import protocol_lines, table_of
from sdtrain.evaluation.sweep import plan
from sdtrain.evaluation.workers import run_sweep
from sdtrain.model_card.write import read_evaluation


class MeanShift(FeatureMetric):
    """How far the mean feature has moved: what somebody adds, whole."""

    name, label, description = "mean_shift", "mean shift", "distance of the mean features"
    real = ("features",)

    def __init__(self, protocol, real):
        super().__init__(protocol, real)
        self._mean = real.features.mean(axis=0)

    def measure(self, drawn, captions):
        return float(abs(drawn["features"].mean(axis=0) - self._mean).mean()), 0.5


def test_a_metric_is_one_class_and_one_line(little, run, tmp_path, monkeypatch):
    """Results, table, CSV, command line, and model card show it without knowing it."""
    monkeypatch.setattr(metrics, "METRICS", (*METRICS, MeanShift))
    results = run_sweep(plan(little, [run], tmp_path), say=lambda line: None)
    name = "mean_shift_demo_features"
    assert all(row[name] > 0 and row[f"{name}_ci95"] == 0.5 for row in results.rows)
    described = f"{name}: distance of the mean features; lower is better; 95 % interval, ± {name}_ci95"
    assert described in protocol_lines(results)
    assert table_of(results)[0][name].endswith("± 0.5")
    with (tmp_path / "results.csv").open() as file:
        assert f"{name}_ci95" in next(csv.reader(file))
    assert name in read_evaluation(tmp_path).header


def test_every_metric_states_what_it_needs(little):
    clip = little.model_copy(update={"agreement": "clip", "cmmd": True})
    assert arrays_needed(little, "drawn") == {"features", "shown"}
    assert arrays_needed(little, "real") == {"features"}
    assert arrays_needed(clip, "drawn") == arrays_needed(clip, "real") == {"features", "clip"}
    assert (arrays_needed(little, "captions"), arrays_needed(clip, "captions")) == (set(), {"clip"})


def test_cmmd_of_statistics_is_a_sentence(little):
    statistics = Gaussian(np.zeros(96), np.eye(96))
    assert [metric.name for metric in open_metrics(little, statistics)] == [
        "fid_demo_features",
        "agreement_demo_checker",
    ]
    with pytest.raises(UserError, match="CMMD compares images"):
        open_metrics(little.model_copy(update={"agreement": "clip", "cmmd": True}), statistics)


OF_A_NETWORK = ["kid", "precision", "recall", "density", "coverage"]


def test_each_network_has_its_own_numbers_and_statistics_its_frechet_distance(little):
    both = type(little).model_validate(little.model_dump() | {"networks": "dinov2, inception", "agreement": "none"})
    assert both.networks == ("inception", "dinov2")
    rng = np.random.default_rng(0)
    real, drawn = (
        ImageArrays({name: rng.normal(shift, 1, (40, 8)).astype(np.float32) for name, shift in shifts.items()})
        for shifts in ({"inception": 0, "dinov2": 0}, {"inception": 0, "dinov2": 5})
    )
    metrics = open_metrics(both, real)
    names = ["fid", "fd_dinov2", *(f"{name}{suffix}" for name in OF_A_NETWORK for suffix in ("", "_dinov2"))]
    assert list(descriptions(metrics)) == [metric.name for metric in metrics] == names
    assert list(axes_of(both, has_images=True)) == ["guidance_scale", *names]
    assert list(axes_of(both, has_images=False)) == ["guidance_scale", "fid", "fd_dinov2"]
    found = numbers(metrics, drawn, {})
    assert found["fd_dinov2"] > 100 > 20 > found["fid"]
    assert found["precision_dinov2"] == found["coverage_dinov2"] == 0
    assert min(found["precision"], found["coverage"], found["recall"]) > 0.5


def test_too_few_images_for_neighbours_are_no_number_and_a_remark(little):
    rng = np.random.default_rng(0)
    real, drawn = (ImageArrays({"demo": rng.normal(0, 1, (num, 8))}, {"shown": np.ones(6)}) for num in (5, 6))
    metrics = open_metrics(little, real)
    found = numbers(metrics, drawn, {})
    assert found["recall_demo_features"] is found["recall_demo_features_ci95"] is None
    assert found["kid_demo_features"] is not None
    remarks = [remark for metric in metrics for remark in metric.remarks()]
    assert "recall_demo_features needs more than 5 images, drawn and real, and there are 5." in remarks
