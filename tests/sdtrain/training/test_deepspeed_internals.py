"""The contract with DeepSpeed's internals: what changes in it is told in a sentence."""

import math
import re
import sys
import tomllib
from types import SimpleNamespace

import deepspeed
import pytest
import torch

from sdtrain.config import load_config
from sdtrain.errors import UserError
from sdtrain.training import deepspeed_internals
from sdtrain.training.deepspeed_internals import (
    TESTED_VERSION,
    ZeroInternals,
    changed_functions,
    missing,
    require_tested_version,
)
from tests.sdtrain.launching import REPOSITORY
from tests.training_fixtures import write_config


@pytest.fixture(scope="module")
def zero(tmp_path_factory, ranks):
    """DeepSpeed's own optimizer of a network of one parameter."""
    from sdtrain.training.engine import deepspeed_config, start_engine

    file = write_config(tmp_path_factory.mktemp("zero") / "c.yaml", "demo", "data", precision="bf16")
    config = load_config(str(file))
    toy = torch.nn.Linear(4, 1, bias=False).bfloat16()
    return start_engine(toy, config, deepspeed_config(config, 1, 4, None)).optimizer


def test_the_installed_deepspeed_has_everything_that_we_rely_on(zero):
    said = missing(zero)
    assert not said, " ".join(said)


class _Without:
    """Another optimizer without one attribute."""

    def __init__(self, whole, name):
        self._whole, self._name = whole, name

    def __getattr__(self, name):
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._whole, name)


@pytest.mark.parametrize("name", deepspeed_internals._ATTRIBUTES)
def test_a_missing_attribute_is_named(zero, name):
    said = missing(_Without(zero, name))
    assert f"_Without has no attribute {name}; sdtrain.training.deepspeed_internals relies on it." in said


@pytest.mark.parametrize("name", deepspeed_internals._METHODS)
def test_a_method_that_is_gone_or_takes_something_else_is_named(zero, name, monkeypatch):
    kind = type(zero)
    monkeypatch.setattr(kind, name, lambda self, other: None)
    expected = ", ".join(deepspeed_internals._METHODS[name])
    assert missing(zero) == [
        f"{kind.__name__}.{name} takes self, other, not {expected}; sdtrain.training.deepspeed_internals relies on it."
    ]
    monkeypatch.setattr(kind, name, None)
    assert missing(zero)[0].startswith(f"{kind.__name__} has no method {name}; ")


@pytest.mark.parametrize("name", deepspeed_internals._SCALER)
def test_a_loss_scaler_without_its_state_is_named(zero, name, monkeypatch):
    scaler = {other: 1.0 for other in deepspeed_internals._SCALER if other != name} | {"dynamic": True}
    monkeypatch.setattr(zero, "loss_scaler", SimpleNamespace(**scaler))
    assert (
        missing(zero)[-1]
        == f"SimpleNamespace has no attribute {name}; sdtrain.training.deepspeed_internals relies on it."
    )


def test_what_takes_the_place_of_a_function_does_the_same(zero):
    from deepspeed.runtime import utils

    theirs = utils.mask_nan_or_inf_with_val_inplace
    assert changed_functions(utils) == changed_functions(sys.modules[type(zero).__module__]) == []
    for value in (0.0, 3.5, math.nan, math.inf, -math.inf):
        ours, expected = torch.tensor(value), torch.tensor(value)
        deepspeed_internals._mask_nonfinite(ours, device="cpu")
        theirs(expected, device="cpu")
        assert torch.equal(ours, expected)
    other = SimpleNamespace(__name__="other", mask_nan_or_inf_with_val_inplace=lambda norm: None)
    assert changed_functions(other)[0].startswith("mask_nan_or_inf_with_val_inplace takes norm, not input, device, val")
    assert changed_functions(math)[0].startswith("math has no function mask_nan_or_inf_with_val_inplace; ")


def test_training_does_not_start_on_other_internals(zero, monkeypatch):
    monkeypatch.delattr(type(zero), "update_lp_params")
    with pytest.raises(UserError, match=r"is not the tested one. .* has no method update_lp_params"):
        ZeroInternals(SimpleNamespace(optimizer=zero))


def test_another_version_is_refused_before_anything_is_started(monkeypatch):
    require_tested_version()
    for found in ("0.19.6", "0.19.80", "0.20.0", "1.0"):
        monkeypatch.setattr(deepspeed_internals, "version", lambda _, found=found: found)
        with pytest.raises(UserError, match=rf"DeepSpeed {found} is installed, .* pip install deepspeed==0\.19\.8"):
            require_tested_version()
    monkeypatch.setattr(deepspeed_internals, "version", lambda _: f"{TESTED_VERSION}+1a2b3c")
    require_tested_version()


def test_the_version_is_pinned_to_the_tested_one_everywhere():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert f"deepspeed=={TESTED_VERSION}" in project["dependencies"]
    assert f"deepspeed=={TESTED_VERSION}" in (REPOSITORY / "requirements.lock").read_text().split()
    assert deepspeed.__version__.partition("+")[0] == TESTED_VERSION


def test_one_module_alone_touches_what_is_not_public():
    private = re.compile(r"deepspeed\.(runtime|ops|utils|accelerator)\b|\._zero\._|bit16|fp32_groups|check_overflow")
    touching = [
        str(path.relative_to(REPOSITORY))
        for path in sorted((REPOSITORY / "sdtrain").rglob("*.py"))
        if private.search(path.read_text())
    ]
    assert touching == ["sdtrain/training/deepspeed_internals.py"]
