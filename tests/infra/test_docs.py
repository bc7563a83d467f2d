"""Every command of the README and the pages: its program, subcommand, options, files and names are there."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from filters.recipe import known_recipes
from flows.build_dataset import build_dataset
from flows.demo import build_demo
from flows.evaluate_checkpoint import evaluate_checkpoint
from flows.reproduce_sd_v1 import reproduce_sd_v1
from flows.train_unet import train_unet
from infra.box.__main__ import COMMANDS
from infra.box.services import FAMILY_GRACE_S, Program
from sdtrain.cli import app
from sdtrain.config import known_configs
from sdtrain.train import parse_arguments

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "flows/README.md", "infra/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
FLOWS = {flow.name: flow for flow in (build_dataset, build_demo, train_unet, reproduce_sd_v1, evaluate_checkpoint)}
PREFECT = {
    ("deployment", "run"): {"-p", "--watch"},
    ("flow-run", "ls"): {"--limit"},
    ("flow-run", "logs"): set(),
    ("flow-run", "cancel"): set(),
    ("work-pool", "create"): {"--type"},
    ("work-pool", "ls"): set(),
    ("worker", "start"): {"--pool", "--type"},
    ("server", "start"): set(),
}
"""What the tests of a real server say, with the options that they use; test_setup.py asks Prefect for these."""
PROGRAMS = "prefect|sdtrain|make|deepspeed|torchrun|docker|kubectl|helm|python -m"
SYSTEM = {"cp", "df", "git", "source", "systemctl", "tail", "tar", "useradd", "for", "ssh", "ray", "sky", "sbatch"}

# Each kind of failure is held by a test that fails, kills or damages for real.
HELD_BY = {
    "A worker was killed": "tests/infra/box/test_box_acceptance.py::test_worker_killed_during_download",
    "The Prefect server or its database was killed": "tests/infra/box/test_box_acceptance.py::test_server_and_database",
    "The supervisor was killed, or the machine": "tests/infra/box/test_box_acceptance.py::test_killed_supervisor",
    "Prefect's history is lost": "tests/infra/box/test_box_acceptance.py::test_lost_history_costs_nothing_but_itself",
    "The disk is full": "tests/sdtrain/download/test_publish.py::test_a_full_disk_is_a_sentence",
    "A checkpoint is torn": "tests/sdtrain/formats/test_checkpoint.py::test_a_damaged_checkpoint_is_passed_over",
    "A file of the dataset is damaged or gone": "tests/sdtrain/download/test_publish.py::test_a_damaged_shard_is_f",
    "A node or a GPU is lost": "tests/sdtrain/loading/test_loader.py::test_a_step_holds_the_same_samples_and_noise_on",
    "A machine is lost in the middle of a build on S3": "tests/sdtrain/dataset/s3/test_build_on_s3.py::test_a_build",
    "Objects in the bucket were deleted or changed by hand, or by a rule of the bucket": (
        "tests/sdtrain/dataset/s3/test_requests.py::test_an_output_that_was_deleted_by_hand"
    ),
    "A rank hangs": "tests/sdtrain/training/test_watchdog.py::test_a_run_that_hangs_alone",
    "The loss or a gradient is not finite": "tests/sdtrain/test_guarded_train.py::test_where_the_policy_is_to_stop",
    "Images failed to download": "tests/sdtrain/download/test_retry.py::test_each_changed_shard",
    "The recipe was changed": "tests/sdtrain/cli/test_cli.py::test_build_into_the_output_of_another_recipe",
    "The training config was changed": "tests/sdtrain/training/test_changed_runs.py::test_a_run_goes_on_from_its",
    "The run directory is in use": "tests/sdtrain/training/test_run_lock.py::test_a_second_process_is_refused",
    "The port is in use": "tests/sdtrain/training/test_run_lock.py::test_a_port_that_another_job_has",
    "How exactly a run is repeated": "tests/sdtrain/models/test_backends.py::test_deterministic_reaches_pytorch",
    "A removal was interrupted": "tests/sdtrain/dataset/test_lock.py::test_where_a_removal_was_interrupted",
    "The dataset is in use": "tests/sdtrain/dataset/test_lock.py::test_the_second_to_change_it_is_told",
    "The dataset was moved": "tests/filters/inspect/test_views.py::test_after_a_move_the_views_follow",
    "A run should not go on": "tests/flows/test_prefect_server.py::test_cancelled_training_leaves_no_process",
}


def commands(page: str) -> Iterator[str]:
    """The commands of the console blocks, continued lines joined, comments gone, and those between backticks."""
    text = (ROOT / page).read_text()
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for command in re.findall(r"^\$ ((?:.*\\\n)*.*)", block, re.MULTILINE):
            yield re.sub(r"\s+#.*", "", command.replace("\\\n", " ")).strip()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from (" ".join(found.split()) for found in re.findall(rf"`((?:{PROGRAMS}) [^`]+)`", prose))


ALL = [(page, command) for page in PAGES for command in commands(page)]


def words(command: str) -> list[str]:
    """The words without variables before them."""
    parts = shlex.split(re.sub(r'"\$\(cat [^)]*\)"', "SECRET", command).replace("$(", "(").replace("; done", ""))
    while parts and re.match(r"[A-Z_]+=", parts[0]):
        parts = parts[1:]
    return parts


def check_make(rest: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in rest:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@cache
def sdtrain_options(name: str) -> set[str]:
    group: Any = typer.main.get_command(app)
    found = group.commands[name] if name else group
    options = found.get_params(click.Context(found))
    return {"--help"} | {name for option in options for name in (*option.opts, *option.secondary_opts)}


def check_sdtrain(rest: list[str]) -> None:
    own = rest[0].startswith("-")
    check_options(rest if own else rest[1:], sdtrain_options("" if own else rest[0]))


def check_options(rest: list[str], known: set[str]) -> None:
    for option in (word.partition("=")[0] for word in rest if word.startswith("-")):
        assert option in known, option


def check_prefect(rest: list[str]) -> None:
    rest = [word for word in rest if word != "--no-prompt"]
    name = (rest[0], rest[1])
    if rest[0] == "deploy":
        assert rest[1] == "--all"
        return
    assert name in PREFECT, name
    if name == ("deployment", "run"):
        check_run(rest[2], [after for word, after in pairwise(rest) if word == "-p"])
    else:
        check_options(rest[2:], PREFECT[name])


def check_run(deployment: str, parameters: list[str]) -> None:
    deployments = {one["name"]: one for one in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    flow_name, _, deployment = deployment.rpartition("/")
    assert deployment in deployments
    function = deployments[deployment]["entrypoint"].rpartition(":")[2]
    flow: Any = next(flow for flow in FLOWS.values() if flow.fn.__name__ == function)
    assert flow_name in ("", flow.name)
    given = dict(parameter.split("=", 1) for parameter in parameters)
    flow.validate_parameters({**deployments[deployment].get("parameters", {}), **given})


def check_launcher(rest: list[str]) -> None:
    """Launchers start training; torchrun a command of ours too."""
    if "sdtrain.cli" in rest:
        check_sdtrain(rest[rest.index("sdtrain.cli") + 1 :])
        return
    script = next(word for word in rest if word.endswith(".py"))
    assert (ROOT / script).exists()
    assert parse_arguments(rest[rest.index(script) + 1 :]).config in known_configs()


def check_duckdb(rest: list[str]) -> None:
    assert rest[0] == "-readonly"
    assert rest[1].endswith("metadata.duckdb")


def check_pip(rest: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert re.fullmatch(r"\.\[(\w+)\]", rest[-1])[1] in extras  # type: ignore[index]


def check_files(rest: list[str]) -> None:
    for word in rest:
        path = word.partition("=")[2] if word.startswith("--from-file") else word
        if path.startswith("infra/"):
            assert (ROOT / path).exists() or path.startswith("infra/compose/secrets/"), path


def check_python(rest: list[str]) -> None:
    assert rest[0] == "-m"
    assert (ROOT / Path(*rest[1].split("."))).exists() or (ROOT / (rest[1].replace(".", "/") + ".py")).exists()
    if rest[1] == "infra.box":
        assert rest[2] in COMMANDS


CHECKS = {
    "make": check_make,
    "sdtrain": check_sdtrain,
    "prefect": check_prefect,
    "deepspeed": check_launcher,
    "torchrun": check_launcher,
    "duckdb": check_duckdb,
    "pip": check_pip,
    "python": check_python,
    "docker": check_files,
    "kubectl": check_files,
    "helm": check_files,
    "cp": check_files,
}


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{page}:{command[:60]}" for page, command in ALL])
def test_command_is_what_the_programs_take(page: str, command: str) -> None:
    program, *rest = words(command)
    if program.startswith("infra/"):
        check_files([program])
    elif program not in SYSTEM and program != "export":
        CHECKS[program](rest)
    check_files(rest)


def test_pages_have_many_commands() -> None:
    assert len(ALL) > 40
    assert {words(command)[0] for _, command in ALL} >= {"make", "prefect", "sdtrain", "docker", "kubectl", "helm"}


def test_every_kind_of_failure_is_held_by_a_test() -> None:
    titles = re.findall(r"^## (.*)", (ROOT / "docs/resuming.md").read_text(), re.MULTILINE)
    assert titles == list(HELD_BY)
    for held_by in HELD_BY.values():
        file, _, name = held_by.partition("::")
        assert f"def {name}" in (ROOT / file).read_text(), held_by


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page: str) -> None:
    for path in re.findall(r"`((?:flows|infra|tests|sdtrain|docs)/[\w./-]+)`", (ROOT / page).read_text()):
        assert (ROOT / path).exists(), path


def test_the_systems_service_runs_the_box_and_waits_longer_than_it_takes_to_end() -> None:
    unit = (ROOT / "infra/systemd/sdtrain-box.service").read_text()
    found = re.search(r"^ExecStart=\S+/python (.*)$", unit, re.MULTILINE)
    assert found
    check_python(found.group(1).split())
    limit = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert limit
    assert int(limit.group(1)) >= 3 * Program("any", []).grace_s + FAMILY_GRACE_S


def test_recipes_on_the_pages_are_known() -> None:
    for _, command in ALL:
        if command.startswith("sdtrain build "):
            recipe = words(command)[2]
            assert recipe.endswith(".yaml") or recipe == "--help" or recipe in known_recipes()
