import pytest
import torch
from diffusers.training_utils import EMAModel

from sdtrain.config import EmaConfig
from sdtrain.ema import Ema, ema_decay


def test_decay_warms_up_to_its_limit():
    config = EmaConfig(decay=0.9999)
    assert [ema_decay(n, config) for n in (0, 1, 90)] == pytest.approx([1 / 10, 2 / 11, 91 / 100])
    assert ema_decay(10**6, config) == 0.9999
    assert ema_decay(0, EmaConfig(decay=0.9, warmup=False)) == 0.9


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
