"""With --json a command's standard output is one JSON document, or an object a line, and nothing else."""

import math
import os
import subprocess
import sys
from pathlib import PurePosixPath

import pytest

from filters.recipe import known_recipes
from sdtrain import __version__, cli
from sdtrain.cli.output import print_json
from tests.training_fixtures import write_config, write_latents, write_models


def test_recipes_and_checks(document, tmp_path):
    assert list(document("recipes")) == known_recipes()
    assert document("recipe", "laion-aesthetics")["select"]["rules"]["min_side"] == 512
    found = document("check", "sd-v1-2", "--data", tmp_path / "none", code=2)
    assert any(check["is_problem"] for check in found)


def test_a_training_run(document, tmp_path):
    models = write_models(tmp_path / "models")
    config = write_config(tmp_path / "c.yaml", models, write_latents(tmp_path / "data", models), steps=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.read_text())
    assert document("status", tmp_path / "run")["num_steps"] == 3


def test_what_json_lacks_becomes_null_and_text(capsys):
    print_json({"loss": math.nan, "rows": [(1.5, -math.inf)], "path": PurePosixPath("a/b")})
    assert capsys.readouterr().out == '{"loss": null, "rows": [[1.5, null]], "path": "a/b"}\n'


def test_the_version_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sdtrain", "--version"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert capsys.readouterr().out == f"sdtrain {__version__}\n"


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("sdtrain fun", ["funnel"]),
        ("sdtrain build laion-", ["laion-aesthetics", "laion-high-resolution"]),
        ("sdtrain check sd-v1-1", ["sd-v1-1-256", "sd-v1-1-512"]),
        ("sdtrain evaluate --sca", ["--scales"]),
    ],
)
def test_a_shell_completes_commands_names_and_options(words, completed):
    asked = {"_SDTRAIN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    command = [sys.executable, "-c", "from sdtrain.cli import app; app(prog_name='sdtrain')"]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=False)
    assert done.stdout.split() == completed
