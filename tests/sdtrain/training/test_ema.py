import pytest
import torch
from diffusers.training_utils import EMAModel

from sdtrain.config.sections import EmaConfig
from sdtrain.training.ema import Ema, ema_decay


def test_decay_warms_up_to_its_limit():
    config = EmaConfig(decay=0.9999)
    assert [ema_decay(n, config) for n in (0, 1, 90)] == pytest.approx([1 / 10, 2 / 11, 91 / 100])
    assert ema_decay(10**6, config) == 0.9999
    assert ema_decay(0, EmaConfig(decay=0.9, warmup=False)) == 0.9


def test_an_average_that_was_never_counted_is_past_its_warm_up():
    for decay in (0.9999, 0.999, 0.9, 0.5, 0.05, 0.0):
        config = EmaConfig(decay=decay)
        ema = Ema(torch.zeros(2), config)
        ema.go_on_from(torch.ones(2), None)
        assert ema_decay(ema.num_updates, config) == pytest.approx(decay)
        assert ema.num_updates == 0 or ema_decay(ema.num_updates - 1, config) < decay - 1e-12
        ema.update()
        assert ema.average.tolist() == pytest.approx([decay] * 2)


def test_average_equals_the_formula_and_diffusers_own():
    weights, config = torch.nn.Parameter(torch.zeros(3)), EmaConfig(decay=0.95)
    ours, theirs = Ema(weights, config), EMAModel([weights], decay=0.95)
    theirs.step([weights])  # its first update has decay 0; from then on it is one behind ours
    expected = torch.zeros(3, dtype=torch.float64)
    for n in range(300):
        with torch.no_grad():
            weights += torch.tensor([1.0, -0.5, 0.1])
        ours.update()
        theirs.step([weights])
        decay = min(0.95, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights.detach().double()
    torch.testing.assert_close(ours.average.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.average, theirs.shadow_params[0], rtol=1e-3, atol=1e-3)
