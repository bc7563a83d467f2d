"""Which libraries each command loads: an import that creeps in costs everybody seconds at every start."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

from sdtrain.dataset.layout import DatasetDir  # noqa: E402
from sdtrain.settings import dump_settings  # noqa: E402
from tests.filters.removal_fixtures import NUM_ROWS, build, make_recipe, serve, write_metadata, write_photos  # noqa: E402
from tests.training_fixtures import write_config, write_latents, write_models, write_run  # noqa: E402

PYTHON, BIN = sys.executable, Path(sys.executable).parent
SDTRAIN = (BIN / "sdtrain",)
NETWORKS = {"torch", "torchvision", "open_clip", "timm", "diffusers", "transformers", "accelerate", "deepspeed"}
OTHERS = {"scipy", "cv2", "imagehash", "matplotlib", "img2dataset", "tensorboard", "boto3", "ray", "dask", "faiss"}
PREFECT = {"prefect"}


def loaded_by(*command: object, **environment: str) -> set[str]:
    """The top-level packages that a command's process has loaded, once it has ended well."""
    arguments = [PYTHON, "-X", "importtime", *map(str, command)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | environment, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    names = set(re.findall(r"^import time: +\d+ \| +\d+ \| *(\w+)", done.stderr, re.MULTILINE))
    assert "os" in names or "encodings" in names  # that is, the list was read
    return names


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: str) -> tuple[Path, Path]:
    """A dataset whose stages have all run, and the file of its recipe; the report is written as well."""
    folder = tmp_path_factory.mktemp("finished")
    write_photos(folder / "www")
    with serve(folder / "www") as port:
        recipe = make_recipe(write_metadata(folder / "metadata" / "a.parquet", port, range(NUM_ROWS)))
        (folder / "recipe.yaml").write_text(dump_settings(recipe))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SDTRAIN_CACHE", cache)
            build(DatasetDir(folder / "data"), recipe)
    return folder / "data", folder / "recipe.yaml"


@pytest.mark.parametrize(
    "command",
    [
        ("--help",),
        ("build", "--help"),
        ("evaluate", "--help"),
        ("recipes",),
        ("recipe", "laion-aesthetics"),
        ("plan", "--recipe", "laion-aesthetics"),
    ],
    ids=" ".join,
)
def test_what_needs_no_dataset_loads_no_heavy_library(command: tuple[str, ...]) -> None:
    assert not loaded_by(*SDTRAIN, *command) & (NETWORKS | OTHERS | PREFECT | {"pyarrow", "pandas", "aiohttp"})


@pytest.mark.parametrize(
    "command",
    [
        ("query", "DATA", "SELECT count(*) FROM decisions"),
        ("funnel", "DATA"),
        ("status", "DATA"),
        ("decide", "DATA", "--min-side", "80", "--dry-run"),
        ("build", "RECIPE", "--output", "DATA"),
    ],
    ids=lambda command: command[0],
)
def test_questions_about_a_finished_dataset_load_no_networks(
    command: tuple[str, ...], finished: tuple[Path, Path], cache: str
) -> None:
    if command[0] != "build":
        views(finished[0])
    elif not (finished[0] / "report.html").exists():  # the first time the report is drawn, with matplotlib
        loaded_by(*SDTRAIN, "build", finished[1], "--output", finished[0], SDTRAIN_CACHE=cache)
    given = [{"DATA": str(finished[0]), "RECIPE": str(finished[1])}.get(word, word) for word in command]
    assert not loaded_by(*SDTRAIN, *given, SDTRAIN_CACHE=cache) & (NETWORKS | OTHERS | PREFECT)


def views(root: Path) -> None:
    """Writes metadata.duckdb, as the first finished build does."""
    from filters.inspect.views import write_views
    from filters.recipe_record import read_recipe

    if not DatasetDir(root).database.exists():
        write_views(DatasetDir(root), read_recipe(DatasetDir(root)))


@pytest.mark.parametrize("flow", ["build_dataset", "train_unet", "reproduce_sd_v1", "evaluate_checkpoint", "demo"])
def test_flow_is_known_to_prefect_before_any_network_is_loaded(flow: str) -> None:
    assert not loaded_by("-c", f"import flows.{flow}") & (NETWORKS | OTHERS)


def test_box_starts_without_prefect() -> None:
    assert not loaded_by("-m", "infra.box", "--help") & (NETWORKS | OTHERS | PREFECT)


def test_mistake_in_a_training_config_is_told_without_networks() -> None:
    assert not loaded_by("sdtrain/train.py", "--help") & (NETWORKS | OTHERS | PREFECT)


@pytest.mark.slow
def test_sampling_loads_what_makes_images_and_no_more(tmp_path: Path) -> None:
    run = write_run(tmp_path, 0.1)
    loaded = loaded_by(
        *(*SDTRAIN, "sample", run, "a red circle", "--output", tmp_path / "drawn"), "--steps", 1, "--dtype", "fp32"
    )
    assert "diffusers" in loaded
    theirs = {"scipy", "boto3"}  # diffusers and accelerate load them where they are installed
    assert loaded & ({"open_clip", "timm", "deepspeed", "duckdb"} | (OTHERS - theirs) | PREFECT) == set()


@pytest.mark.slow
def test_training_loads_no_library_of_the_data_stages(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models")
    config = write_config(tmp_path / "c.yaml", models, write_latents(tmp_path / "data", models), steps=1)
    loaded = loaded_by("sdtrain/train.py", "--config", config, "--output", tmp_path / "run", DS_ACCELERATOR="cpu")
    assert "deepspeed" in loaded
    assert loaded & ({"open_clip", "timm", "cv2", "imagehash", "matplotlib", "img2dataset"} | PREFECT) == set()
