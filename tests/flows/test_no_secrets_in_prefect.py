"""A presigned URL that a flow gets, or that an error quotes, is in nothing that Prefect keeps."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.build_dataset import build_dataset
from flows.evaluate_checkpoint import evaluate_checkpoint
from flows.reproduce_sd_v1 import reproduce_sd_v1
from flows.support.process_tree import run_tree
from flows.train_unet import train_unet
from tests.filters.removal_fixtures import NUM_ROWS, files_with, make_recipe, serve, write_metadata, write_photos
from tests.filters.store_fixtures import PLANTED, QUERY, SPELLINGS, needs_httpfs, serving

FLOWS = [build_dataset, evaluate_checkpoint, reproduce_sd_v1, train_unet]
# Parameters that are text; a new one fails the test below until it is known whether it can hold a URL.
LOCATIONS = {"metadata", "output", "engine_address", "model", "prompts", "reference", "data", "init_from"}
LOCATIONS |= {"laion2b_en", "high_resolution", "aesthetics", "questions", "training_data"}
WORDS = {"recipe", "work_dir", "credentials", "config", "configs", "hostfile", "slurm_options", "slurm_script"}
WORDS |= {"x", "y"}  # columns of an evaluation

SCRIPT = """
import sys
from flows.build_dataset import build_dataset
from flows.support.decorators import report_user_errors
from flows.support.stage_runner import StageOptions, run_stage
from flows.train_unet import train_unet
from pathlib import Path
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.shard_report import fingerprint
from sdtrain.dataset.stage import plain_stage
from sdtrain.dataset.stage import Stage

signed, planted, recipe, folder = sys.argv[1:]

def fail(dataset, recipe, shards):
    raise OSError(f"GET {recipe} was answered with 403")
    yield

@flow
@report_user_errors
def batches():
    bad = plain_stage("bad", lambda *_: [0], lambda *_: fingerprint("x", None), fail)
    run_stage(bad, DatasetDir(Path(folder, "bad")),
              planted, StageOptions())

@flow
@report_user_errors
def breaks():
    try:
        raise OSError(f"GET {planted} was answered with 403")
    except OSError as error:
        raise ValueError("at all") from error

assert build_dataset(recipe=recipe, metadata=signed, output=f"{folder}/data", return_state=True).is_completed()
for state in (
    build_dataset(recipe=recipe, metadata=signed.replace("a.parquet", "b.parquet"), output="x", return_state=True),
    build_dataset(recipe=recipe, metadata=planted, output=planted, return_state=True),
    train_unet(config="tiny", data=planted, output=f"{folder}/run", init_from=planted, return_state=True),
    batches(return_state=True),
    breaks(return_state=True),
):
    assert state.is_failed(), state
    print("failed:", state.message)

with get_client(sync_client=True) as client:
    made = client.create_deployment(
        client.create_flow(build_dataset), "d", parameter_openapi_schema=build_dataset.parameters.model_dump(),
        enforce_parameter_schema=True,
    )
    client.create_flow_run_from_deployment(made, parameters={"recipe": "demo", "metadata": "${SIGNED}"})
    try:
        client.create_flow_run_from_deployment(made, parameters={"recipe": "demo", "metadata": planted})
    except PrefectHTTPStatusError as error:
        print("refused:", error.response.status_code)
    else:
        raise AssertionError("the server took the URL")
"""


def bounds(schema: dict[str, Any]) -> list[dict[str, Any]]:
    options = [option.get("items", option) for option in schema.get("anyOf", [schema])]
    return [option for option in options if option.get("type") == "string" and not {"enum", "const"} & set(option)]


def test_of_every_parameter_it_is_known_whether_it_can_hold_a_url() -> None:
    for flow in FLOWS:
        texts = {name: bounds(schema) for name, schema in flow.parameters.model_dump()["properties"].items()}
        guarded = {name for name, found in texts.items() if found and all("?!" in f.get("pattern", "") for f in found)}
        assert guarded <= LOCATIONS
        assert {name for name, found in texts.items() if found} - guarded <= WORDS


def test_the_log_of_a_child_holds_no_secret(tmp_path: Path) -> None:
    lines: list[str] = []
    run_tree([sys.executable, "-c", f"print('python train.py --data {PLANTED} end')"], tmp_path / "log", lines.append)
    assert lines == ["python train.py --data https://data.example/x.parquet end"]
    assert (tmp_path / "log").read_text() == lines[0] + "\n"


@pytest.mark.slow
@needs_httpfs
def test_prefect_keeps_no_secret_of_parameters_messages_and_logs(tmp_path: Path) -> None:
    write_photos(tmp_path / "www")
    (tmp_path / "spy").mkdir()
    with serve(tmp_path / "www") as port, serving() as store:
        metadata = write_metadata(tmp_path / "a.parquet", port, range(NUM_ROWS))
        store.files["data/a.parquet"] = metadata.read_bytes()
        recipe = tmp_path / "mine.yaml"
        recipe.write_text(yaml.safe_dump(make_recipe(metadata).model_dump(mode="json")))
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "AWS_"))}
        environment |= {
            "PREFECT_HOME": str(tmp_path / "home"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
            "PREFECT_LOGGING_LEVEL": "DEBUG",
            "DO_NOT_TRACK": "1",
        }
        signed = f"{store.url}/data/a.parquet?{QUERY}"
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, signed, PLANTED, str(recipe), str(tmp_path)],
            cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count("failed: ") == 5
    assert "refused: 4" in said
    assert (tmp_path / "home" / "prefect.db").stat().st_size > 100_000
    assert [spelling for spelling in SPELLINGS if spelling in said] == []
    assert files_with(tmp_path, SPELLINGS) == []
