import json

import pytest

from sdtrain.dataset.work import WORK
from sdtrain.errors import UserError
from sdtrain.plan import measured
from sdtrain.plan.estimate import DatasetJob, Machines, Planner
from sdtrain.plan.measured import Measured, MeasuredRate, MeasuredSpeed, read_measured, record_measured
from sdtrain.plan.rates import load_rates
from sdtrain.plan.speeds import Load, estimate_speed, published_speeds


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """Where plans look for our own measurements: a file that is not there yet."""
    path = tmp_path / "measured.json"
    monkeypatch.setattr(measured, "MEASURED", path)
    return path


def speed_of(*load):
    return estimate_speed(Load(*load))


@pytest.mark.usefixtures("ours")
def test_every_published_figure_is_given_back_without_a_remark():
    for gpu, speeds in published_speeds().items():
        for speed in speeds:
            found = speed_of(gpu, speed.num_gpus, speed.micro_batch or 16, speed.resolution)
            assert found.images_per_s == pytest.approx(speed.images_per_s)
            assert found.source.startswith("published: ")
            assert speed.source in found.source
            assert found.remarks == ()


@pytest.mark.usefixtures("ours")
def test_between_figures_it_interpolates():
    # Half way between 8 and 32 GPUs in the logarithm; between micro-batches 8 and 32 the seconds are linear.
    assert speed_of("h200", 16, 32, 512).images_per_s == pytest.approx((143.9 + 134.6) / 2)
    seconds = 8 / 208 + (20 - 8) / (32 - 8) * (32 / 290 - 8 / 208)
    assert speed_of("gb200", 8, 20, 512).images_per_s == pytest.approx(20 / seconds)
    assert speed_of("a100", 8, 4, 256).images_per_s == 137.5  # whose source says no micro-batch


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize(
    ("load", "remark"),
    [
        (("h200", 128, 4, 512), "no figure beyond 64 GPUs with micro-batch 4, whose speed is taken: 128 communicate"),
        (("h200", 8, 4, 512), "no figure below 64 GPUs with micro-batch 4, whose speed is taken"),
        (("h200", 64, 2, 512), "no figure below micro-batch 4: the micro-step is taken to last as long"),
        (("h200", 8, 64, 512), "no figure above micro-batch 32, whose speed is taken"),
        (("a100", 256, 8, 512), "no figure beyond 128 GPUs, whose speed is taken"),
        (
            ("h200", 8, 64, 256),
            "a micro-batch of 64 there is taken to last as long as one of 14.3 at 512",
        ),
    ],
)
def test_nothing_is_extrapolated_silently(load, remark):
    assert any(remark in said for said in speed_of(*load).remarks)


@pytest.mark.usefixtures("ours")
def test_below_the_smallest_micro_batch_the_host_sets_the_pace():
    assert speed_of("h200", 64, 1, 512).images_per_s == pytest.approx(80 / 4)
    assert speed_of("h200", 64, 8, 256).images_per_s == pytest.approx(2 * 80)  # no more FLOP than 4 at 512 px


@pytest.mark.usefixtures("ours")
def test_at_256_px_a_micro_step_lasts_as_long_as_one_of_as_many_flop_at_512():
    equal = speed_of("h200", 8, 64, 256).images_per_s
    seconds = 4 / 80 + (64 * 0.540 / 2.410 - 4) / 28 * (32 / 143.9 - 4 / 80)
    assert equal == pytest.approx(64 / seconds)


def test_our_own_measurement_takes_the_place_of_published_ones(ours):
    mine = [
        MeasuredSpeed(gpu="h200", resolution=512, num_gpus=1, micro_batch=size, images_per_s=rate, source="made up")
        for size, rate in ((8, 100.0), (32, 150.0))
    ]
    record_measured(Measured(training=mine[:1]), ours)
    record_measured(Measured(training=mine[1:]), ours)
    assert read_measured().training == tuple(mine)
    one = speed_of("h200", 1, 32, 512)
    assert (one.images_per_s, one.remarks) == (150, ())
    assert one.source == "measured: 150.0 images/s a GPU at micro-batch 32, from 150 at 1 GPU, micro-batch 32 (made up)"
    many = speed_of("h200", 32, 32, 512)
    assert many.images_per_s == pytest.approx(150 * 134.6 / 143.9)
    assert "measured on 1 GPU; times 0.935, which published speeds lose up to 32" in many.remarks
    assert any("no figure beyond 64 GPUs" in said for said in speed_of("h200", 256, 8, 512).remarks)
    assert speed_of("h100", 8, 64, 512).source.startswith("published")  # another GPU


def test_a_gpu_that_only_we_have_measured_can_be_planned_with(ours):
    speed = MeasuredSpeed(gpu="mi300x", resolution=512, num_gpus=1, micro_batch=32, images_per_s=9, source="made up")
    with pytest.raises(UserError, match="mi300x"):
        speed_of("mi300x", 8, 32, 512)
    record_measured(Measured(training=(speed,)), ours)
    found = speed_of("mi300x", 8, 32, 512)
    assert found.images_per_s == 9
    assert found.remarks == ("measured on 1 GPU; what 8 lose in communication is not in it",)


def test_measured_rates_of_other_stages_count_for_their_gpu_alone(ours):
    rate = MeasuredRate(gpu="h200", name="encode_pictures", value=500, source="made up")  # as earlier versions wrote
    record_measured(Measured(rates=(rate,)), ours)
    lines = {
        gpu: Planner(load_rates((), gpu), Machines(1, gpu)).dataset(DatasetJob("mine", 512, 512, 1, 1000), WORK)[-1]
        for gpu in ("h200", "a100")
    }
    assert lines["h200"].source == "measured: made up"
    assert lines["h200"].gpu_hours == pytest.approx(650 / 500 / 3600)
    assert lines["a100"].source.startswith("published")


def test_a_damaged_record_is_a_sentence(ours):
    ours.write_text(json.dumps({"training": [{"gpu": "h200"}]}))
    with pytest.raises(UserError, match=r"measured\.json is damaged"):
        speed_of("h200", 1, 32, 512)
