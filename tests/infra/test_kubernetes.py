"""The manifests hold against the schemas of Kubernetes and Kubeflow, and against what the project is."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime
from prefect.utilities.templating import apply_values

from infra.box.bootstrap import POOLS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "kubernetes"
VERSIONS = ("1.31", "1.35")
KUBEFLOW = {"TrainJob": TrainerV1alpha1TrainJob, "TrainingRuntime": TrainerV1alpha1TrainingRuntime}


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(FOLDER.glob("*.yaml")):
        if not file.name.endswith("-values.yaml"):
            for document in yaml.safe_load_all(file.read_text()):
                yield f"{file.name}:{document['kind']}", document


NAMED = dict(documents())
OFFICIAL = {name: document for name, document in NAMED.items() if document["kind"] not in KUBEFLOW}
TEMPLATES = {pool.name: json.loads((FOLDER / "jobs" / f"{pool.name}.json").read_text()) for pool in POOLS}


def is_valid(document: dict[str, Any], version: str) -> bool:
    kubernetes_validate.validate(document, version, strict=True)
    return True


def job_of(pool: str) -> dict[str, Any]:
    """The job that a worker would start with the template's defaults, as the worker fills it in."""
    template = TEMPLATES[pool]
    defaults = {name: field.get("default") for name, field in template["variables"]["properties"].items()}
    run = {
        "name": "wise-owl",
        "labels": {"prefect.io/flow-run-name": "wise-owl"},
        "env": [{"name": "PREFECT_API_URL", "value": "http://prefect-server:4200/api"}],
        "command": ["prefect", "flow-run", "execute"],
    }
    job = apply_values(template["job_configuration"]["job_manifest"], {**defaults, **run})
    assert "{{" not in json.dumps(job)
    return job  # type: ignore[no-any-return]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", OFFICIAL)
def test_manifest_is_valid(name: str, version: str) -> None:
    assert is_valid(OFFICIAL[name], version)


def test_a_wrong_key_is_noticed() -> None:
    wrong = json.loads(json.dumps(NAMED["services.yaml:StatefulSet"]).replace("terminationGrace", "terminationGrce"))
    wrong["spec"]["template"]["spec"]["terminationGrcePeriodSeconds"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        is_valid(wrong, VERSIONS[0])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("pool", TEMPLATES)
def test_job_that_a_template_gives_is_valid(pool: str, version: str) -> None:
    assert is_valid(job_of(pool), version)


@pytest.mark.parametrize("kind", KUBEFLOW)
def test_training_is_what_kubeflow_reads_and_nothing_else(kind: str) -> None:
    document = NAMED[f"training.yaml:{kind}"]
    read = KUBEFLOW[kind].from_dict(document)
    assert read is not None
    assert normal(read.to_dict()) == normal(document)  # what it does not know would be lost


def normal(value: Any) -> Any:
    """Without nulls, numbers and texts alike."""
    if isinstance(value, dict):
        return {key: normal(item) for key, item in value.items() if item is not None}
    return [normal(item) for item in value] if isinstance(value, list) else str(value)


def training_pod() -> dict[str, Any]:
    jobs = NAMED["training.yaml:TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    return jobs[0]["template"]["spec"]["template"]["spec"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("pod", [training_pod(), job_of("train")["spec"]["template"]["spec"]], ids=["kubeflow", "pool"])
def test_training_has_shared_memory_and_time_for_a_checkpoint(pod: dict[str, Any]) -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert pod["terminationGracePeriodSeconds"] >= 600
    assert volumes[mounts["/data"]]["persistentVolumeClaim"]["claimName"] == "data"


def pods() -> Iterator[dict[str, Any]]:
    yield training_pod()
    yield from (job_of(pool)["spec"]["template"]["spec"] for pool in TEMPLATES)
    for document in OFFICIAL.values():
        if "template" in document.get("spec", {}):
            yield document["spec"]["template"]["spec"]


def test_no_pod_runs_as_root_or_gains_privileges() -> None:
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_every_image_is_pinned_and_prefect_is_that_of_the_lock_file() -> None:
    images = {container["image"] for pod in pods() for container in pod["containers"]}
    for values in ("server-values.yaml", "worker-values.yaml"):
        text = yaml.safe_load((FOLDER / values).read_text())
        image = text["worker"]["image"] if "worker" in text else text["global"]["prefect"]["image"]
        images.add(f"{image['repository']}:{image['prefectTag']}")
    locked = re.search(r"^prefect==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked
    for image in images:
        assert re.search(r":\d+\.\d+", image), image
        if "prefect" in image or "sdtrain" in image:
            assert f":{locked.group(1)}" in image


def test_commands_and_arguments_of_training_are_real() -> None:
    trainer = NAMED["training.yaml:TrainJob"]["spec"]["trainer"]
    script, *arguments = trainer["args"]
    assert (ROOT / script).exists()
    from sdtrain.config import known_configs

    named = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert set(named) == {"--config", "--data", "--output"}
    assert named["--config"] in known_configs()
