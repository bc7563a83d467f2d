"""`sdtrain doctor` tells what a bug report needs, and no secret."""

import json
import sys

import pytest
import torch

from sdtrain import __version__, cli
from sdtrain.preflight import machine
from sdtrain.preflight.machine import describe_machine


@pytest.fixture
def sdtrain(capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sdtrain", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        return capsys.readouterr().out

    return run


def test_versions_processor_memory_disk_components_and_caches_are_told(sdtrain, monkeypatch, tmp_path):
    monkeypatch.setenv("SDTRAIN_CACHE", str(tmp_path))
    told = json.loads(sdtrain("doctor", "--json"))
    assert told["versions"]["sdtrain"].startswith(__version__)
    assert told["versions"]["torch"] in torch.__version__
    assert told["processor"]["precision: auto"].split(":")[0] in ("bf16", "fp32")
    assert {"RAM", "open files"} <= told["memory"].keys()
    assert {"current folder", "temporary files"} <= told["disk"].keys()
    assert {"remote", "ray", "dask", "wandb", "semantic"} <= told["optional components"].keys()
    assert told["caches"]["weights"].startswith(f"{tmp_path}: ")


def test_the_text_holds_what_the_document_does(sdtrain):
    document = json.loads(sdtrain("doctor", "--json"))
    text = sdtrain("doctor")
    for section, facts in document.items():
        assert section in text
        assert all(name in text for name in facts)


def test_what_is_missing_comes_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(machine, "_version", lambda name: "" if name == "faiss-cpu" else "1.0")
    monkeypatch.setenv("PATH", "/nowhere")
    told = describe_machine()
    assert told["optional components"]["semantic"] == "missing faiss-cpu: pip install 'sdtrain[semantic]'"
    assert told["programs"]["c++"].startswith("missing: ")


def test_secrets_of_the_environment_are_not_told(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMIK7MDENG")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrst")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pa55word@proxy.example:3128")
    monkeypatch.setenv("PREFECT_API_URL", "https://user:hidden99@prefect.example/api")
    monkeypatch.setenv("MY_OWN_VARIABLE", "of no concern")
    told = describe_machine()["environment"]
    assert told["AWS_SECRET_ACCESS_KEY"] == told["HF_TOKEN"] == "is set"
    assert "proxy.example:3128" in told["HTTPS_PROXY"]
    assert not any(secret in str(told) for secret in ("wJalrX", "hf_abc", "pa55word", "hidden99", "of no concern"))


def test_caches_that_cannot_be_written_are_named_with_their_variable(monkeypatch):
    monkeypatch.setenv("SDTRAIN_CACHE", "/dev/null/cache")
    monkeypatch.delenv("SDTRAIN_WORK_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    told = describe_machine()["caches"]
    assert told["weights"] == "/dev/null/cache cannot be written: set SDTRAIN_CACHE"
    assert told["datasets on S3"].endswith("set SDTRAIN_WORK_DIR")


def test_a_machine_of_another_kind_is_described_too(monkeypatch, tmp_path):
    """Such as one whose system does not tell the processor's name."""
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert machine.cpu_model(tmp_path / "cpuinfo")
    assert machine.cpu_model(tmp_path / "absent")
    monkeypatch.setattr(machine, "requires", lambda name: None)
    assert describe_machine()["optional components"] == {}
