"""Fixtures for tests of more than one package."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from sdtrain.dataset.layout import DatasetDir

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub, which would be asked again and again where there is none


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first: nobody waits for it in the end."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What all tests import lives as long as the process: no search for garbage in it, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Commands that are tried in this process take over signals, and later tests' children would inherit that."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def digests() -> Callable[[DatasetDir], dict[str, str]]:
    """A function that gives the sha256 of every file of a dataset by name; not manifests and lock, which hold times."""

    def of(dataset: DatasetDir) -> dict[str, str]:
        files = [p for p in dataset.root.rglob("*") if p.is_file() and "manifest" not in p.parts and p != dataset.lock]
        return {dataset.relative(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}

    return of


@pytest.fixture
def document(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that runs a command with --json; what it prints, parsed as strictly as other languages do."""

    def run(*arguments: object, code: int = 0) -> Any:
        from sdtrain import cli

        monkeypatch.setattr(sys, "argv", ["sdtrain", *map(str, arguments), "--json"])
        capsys.readouterr()  # what fixtures have said
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == code
        return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)

    return run
