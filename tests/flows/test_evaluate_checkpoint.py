import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from prefect.logging import disable_run_logger
from prefect.testing.utilities import prefect_test_harness

from flows import evaluate_checkpoint as flow_module
from flows.evaluate_checkpoint import _run_step, evaluate_checkpoint
from flows.support.stage_runner import StageOptions
from sdtrain.dataset.stage import plain_stage
from sdtrain.errors import UserError
from sdtrain.evaluation.layout import EvaluationDir
from sdtrain.evaluation.protocol import CARD_SCALES
from sdtrain.evaluation.sweep import Step, plan

STEP = Step(plain_stage("draw", None, None, None), EvaluationDir(Path("nowhere")), None)  # type: ignore[arg-type]


def test_the_defaults_are_the_model_cards() -> None:
    properties = evaluate_checkpoint.parameters.model_dump()["properties"]
    assert properties["scales"]["default"] == list(CARD_SCALES) == [1.5, 2, 3, 4, 5, 6, 7, 8]
    assert properties["num_prompts"]["default"] == 10_000


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a step whose stage raises these errors, one a try; returns how many tries there were."""

    def run(errors: list[Exception | None], retries: int) -> int:
        tried = []

        def run_stage(*_: Any) -> None:
            tried.append(1)
            if error := errors[len(tried) - 1]:
                raise error

        monkeypatch.setattr(flow_module, "run_stage", run_stage)
        with disable_run_logger():
            _run_step(STEP, StageOptions(), None, retries)  # type: ignore[arg-type]
        return len(tried)

    return run


def test_parts_that_fail_are_tried_again_as_often_as_asked_for(failing: Any) -> None:
    assert failing([RuntimeError("CUDA error"), None], retries=1) == 2
    with pytest.raises(RuntimeError, match="again"):
        failing([RuntimeError("CUDA error"), RuntimeError("again")], retries=1)


def test_a_users_mistake_is_not_tried_again(failing: Any) -> None:
    with pytest.raises(UserError, match="no weights"):
        failing([UserError("no weights"), None], retries=3)


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Parameters of an evaluation that takes seconds."""
    import numpy as np
    from PIL import Image

    from tests.training_fixtures import write_run

    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "prompts.txt").write_text("a red circle\na green square\na blue circle\na red square\n")
    (folder / "real").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "real" / f"{i}.png")
    other = {"num_steps": 2, "part_size": 2, "dtype": "fp32", "network": "demo", "agreement": "demo"}
    return {
        "model": str(write_run(folder, ema_offset=0.02)),
        "prompts": str(folder / "prompts.txt"),
        "reference": str(folder / "real"),
        "num_prompts": 4,
        "scales": [1.0, 3.0],
        "protocol": other,
    }


def test_the_steps_are_sent_to_workers_by_the_names_of_their_functions(
    little: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdtrain.evaluation.protocol import Protocol

    monkeypatch.setenv("SDTRAIN_CACHE", str(tmp_path / "cache"))
    given = {name: little[name] for name in ("prompts", "reference", "num_prompts", "scales")} | little["protocol"]
    steps = plan(Protocol(**given), [Path(little["model"])], tmp_path / "out").steps()
    expected = ["reference", "contexts", "draw", "look", "draw", "look"]
    assert [step.stage.name.split("-")[0] for step in steps] == expected
    for step in steps:
        assert pickle.loads(pickle.dumps(step)) == step


@pytest.mark.parametrize("axis", ["x", "y"])
def test_an_axis_that_is_no_column_is_refused_before_anything_is_drawn(
    axis: str, little: dict[str, Any], tmp_path: Path
) -> None:
    with disable_run_logger():
        ended = evaluate_checkpoint.fn(**little, output=str(tmp_path / "out"), **{axis: "fidd"})
    assert ended.message.startswith(f"--{axis} 'fidd': this evaluation has no such column.")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_flow_leaves_results_and_artifacts_and_a_second_run_does_nothing(
    little: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client

    monkeypatch.setenv("SDTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    with prefect_test_harness(server_startup_timeout=120):
        output = Path(evaluate_checkpoint(**little, output=str(tmp_path / "out")))
        written = (output / "results.json").read_bytes()
        with get_client(sync_client=True) as client:
            artifacts = {artifact.key: artifact.data for artifact in client.read_artifacts()}
            num_tasks = len(client.read_task_runs())
            curve = (output / "curve.png").read_bytes()
            assert evaluate_checkpoint(**little, output=str(tmp_path / "out"), x="guidance_scale") == str(output)
            assert len(client.read_task_runs()) == num_tasks  # another plot draws no image
            assert (output / "curve.png").read_bytes() != curve
            assert evaluate_checkpoint(**little, output=str(tmp_path / "out")) == str(output)
            assert (output / "curve.png").read_bytes() == curve
        with pytest.raises(Exception, match="too few for 5"):
            evaluate_checkpoint(**(little | {"num_prompts": 5}), output=str(tmp_path / "out"))
    assert (output / "results.json").read_bytes() == written
    assert [row["guidance"] for row in json.loads(str(artifacts["evaluation"]))] == ["1", "3"]
    assert "num_steps: 2" in str(artifacts["evaluation-protocol"])
    assert "curve.png" in str(artifacts["guidance-curve"])
    assert num_tasks == 1 + 2 + 2 * (2 + 2)  # the reference, prompts, and two parts drawn and looked at for each scale
