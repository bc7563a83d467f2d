import os
import signal

import pytest

from sdtrain.impact.energy import EnergyLog
from tests.sdtrain.launching import deepspeed, finish, start, wait_for_step
from tests.training_fixtures import write_config, write_latents, write_models


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_that_were_killed_and_went_on_have_spent_both_times(tmp_path):
    models = write_models(tmp_path / "models")
    data = write_latents(tmp_path / "data", models)
    config = write_config(tmp_path / "c.yaml", models, data, steps=12, checkpoint={"every": 2, "keep_last": 100})
    process = start(deepspeed(2), config, tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 4)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    code, text = finish(start(deepspeed(2), config, tmp_path / "run"))
    assert code == 0, text
    first, second = EnergyLog(tmp_path / "run" / "energy.csv").sessions()
    assert (first.num_devices, first.num_hosts, second.num_devices, second.num_hosts) == (2, 1, 2, 1)
    assert 4 <= first.step < second.step == 12
    for spent in (first, second):
        assert spent.device_hours == pytest.approx(2 * spent.host_hours, rel=0.2)
        assert spent.core_hours > 0
    assert "2 sessions; CPUs: " in (tmp_path / "run" / "README.md").read_text()
