"""The parts of the box by themselves, without Prefect; test_box_acceptance.py has the whole."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from flows.support.automations import AUTOMATIONS, HEARTBEAT_S
from infra.box import __main__ as command_line
from infra.box import postgres, services
from infra.box.bootstrap import POOLS, assign_pools, pool_of, write_deployments
from infra.box.layout import ROOT, Box, BoxDir, box_of_environment, lock_box, supervisor_pid
from infra.box.programs import client_environment, server_program, worker_program, write_variables
from infra.box.services import Program, Service, marked
from infra.box.supervisor import require_free_port
from sdtrain.errors import UserError

SLEEPS = "import time; time.sleep(600)"
needs_postgres = pytest.mark.skipif(not postgres._releases(), reason="PostgreSQL is not installed")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that PostgreSQL's user may enter, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp(prefix="sdtrain-box-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Makes services that end with the test."""
    made: list[Service] = []

    def make(name: str, *command: str, **options: float) -> Service:
        program = Program(name, [sys.executable, "-c", *command], **options)  # type: ignore[arg-type]
        made.append(Service(program, tmp_path, tmp_path / f"{name}.log"))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.ask_to_end()
        one.end()


def wait_until(holds: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def test_service_that_is_killed_ends_with_its_children_and_comes_back(
    service: Callable[..., Service], tmp_path: Path
) -> None:
    """The child has a session of its own, so that neither a signal to the group nor its parent's death reaches it."""
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{SLEEPS}'], start_new_session=True)"
    one = service("one", f"{child}; {SLEEPS}")
    wait_until(lambda: len(marked(tmp_path, "one")) == 2)
    first = marked(tmp_path)
    parent = next(process for process in first if process.ppid() == os.getpid())
    assert one.restart_if_ended() is None
    parent.kill()
    wait_until(lambda: not one.is_running)
    assert "one had ended (killed by SIGKILL)" in str(one.restart_if_ended())
    assert not [process for process in first if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert one.is_running


def test_service_that_ends_at_once_is_started_less_and_less_often(service: Callable[..., Service]) -> None:
    one = service("one", "raise SystemExit(3)")
    wait_until(lambda: not one.is_running)
    assert "exit code 3" in str(one.restart_if_ended())
    wait_until(lambda: not one.is_running)
    assert one.restart_if_ended() is None  # not before two seconds have passed


def test_service_that_ignores_its_signal_is_killed(service: Callable[..., Service], tmp_path: Path) -> None:
    deaf = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); {SLEEPS}"
    one = service("one", deaf, grace_s=0.3)
    wait_until(lambda: (tmp_path / "one.log").read_text())
    one.ask_to_end()
    one.end()
    assert marked(tmp_path) == set()


def test_services_of_a_killed_supervisor_end(tmp_path: Path) -> None:
    parent = (
        "import sys, time\nfrom pathlib import Path\nfrom infra.box.services import Program, Service\n"
        f"box = Path({str(tmp_path)!r})\nprogram = Program('one', [sys.executable, '-c', {SLEEPS!r}])\n"
        "Service(program, box, box / 'one.log').start()\ntime.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    wait_until(lambda: len(marked(tmp_path)) == 1)
    process.kill()
    process.wait()
    wait_until(lambda: marked(tmp_path) == set())


def test_log_that_is_full_begins_anew_and_keeps_the_last_one(
    service: Callable[..., Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "MAX_LOG_BYTES", 100)
    one = service("one", f"print('x' * 200, flush=True); input_ = {SLEEPS!r}; exec(input_)")
    log = tmp_path / "one.log"
    wait_until(lambda: log.stat().st_size > 200)
    one.trim_log()
    assert (log.stat().st_size, (tmp_path / "one.log.1").read_text()) == (0, "x" * 200 + "\n")


@needs_postgres
def test_database_is_made_with_a_password_that_it_asks_for(folder: Path) -> None:
    half_made = BoxDir(folder).cluster.with_name(".postgres.new")  # by a first start that was cut off
    half_made.mkdir(parents=True)
    (half_made / "PG_VERSION").write_text("15")
    server = postgres.find_postgres(BoxDir(folder), free_port())
    server.prepare()
    one = Service(server.program, folder, folder / "postgres.log")
    one.start()
    try:
        wait_until(server.is_ready)
        server.make_database()
        server.make_database()  # again changes nothing
        ask = [server.programs / "psql", "-h", "127.0.0.1", "-p", str(server.port), "-U", "prefect", "-w", "prefect"]
        command = [str(part) for part in [*ask, "-tAc", "SELECT current_user"]]
        allowed = subprocess.run(command, env={**os.environ, **server.environment}, capture_output=True, text=True)
        assert allowed.stdout == "prefect\n"
        refused = subprocess.run(
            command, env={**os.environ, "PGPASSFILE": "/nowhere", "HOME": str(folder)}, capture_output=True, text=True
        )
        assert refused.returncode != 0
        assert "password" in refused.stderr
        if os.geteuid() == 0:
            owner = psutil.Process(int((folder / "postgres" / "postmaster.pid").read_text().splitlines()[0]))
            assert owner.username() == "postgres"
        assert BoxDir(folder).passfile.stat().st_mode & 0o077 == 0
    finally:
        one.ask_to_end()
        one.end()
    again = postgres.find_postgres(BoxDir(folder), free_port())
    password = BoxDir(folder).passfile.read_text().rpartition(":")[2]
    again.prepare()
    assert BoxDir(folder).passfile.read_text() == f"127.0.0.1:{again.port}:*:prefect:{password}"


def free_port() -> int:
    from infra.box.supervisor import _free_port

    return _free_port()


def test_missing_postgres_is_a_sentence_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_DEBIAN", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"PostgreSQL 14 or newer is missing. Run `apt-get install postgresql`"):
        postgres.find_postgres(BoxDir(tmp_path), 5432)


def test_data_of_a_release_that_is_gone_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "PG_VERSION").write_text("9\n")
    with pytest.raises(UserError, match="made by PostgreSQL 9, which is not installed any more"):
        postgres.find_postgres(BoxDir(tmp_path), 5432)


@needs_postgres
@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as somebody else")
def test_root_is_told_of_a_folder_that_postgres_cannot_enter(folder: Path) -> None:
    folder.chmod(0o700)
    with pytest.raises(UserError, match=f"cannot enter {folder}. Choose another directory"):
        postgres.find_postgres(BoxDir(folder), 5432)


def test_lock_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    directory = BoxDir(tmp_path)
    assert supervisor_pid(directory) is None
    with lock_box(directory):
        assert supervisor_pid(directory) == os.getpid()
        with pytest.raises(UserError, match="is already up"), lock_box(directory):
            pass
    assert supervisor_pid(directory) is None


def test_taken_port_is_a_sentence() -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="is another Prefect server running"):
            require_free_port(other.getsockname()[1])


@pytest.mark.parametrize("port", ["0", "70000", "http", "-1"])
def test_port_that_is_none_is_a_sentence(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDTRAIN_PORT", port)
    with pytest.raises(UserError, match=f"SDTRAIN_PORT={port} is no port"):
        box_of_environment()


def test_box_lies_in_the_repository_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SDTRAIN_STATE", "SDTRAIN_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert box_of_environment() == Box(BoxDir(ROOT / ".sdtrain-box"), 4200)


def test_every_deployment_goes_to_a_pool_that_has_a_worker(tmp_path: Path) -> None:
    pools = {deployment["name"]: deployment["work_pool"]["name"] for deployment in assign_pools()["deployments"]}
    assert set(pools.values()) <= {pool.name for pool in POOLS}
    assert pools["train-sd-v1"] == "train"
    assert {pool_of([]), pool_of(["dataset", "demo"]), pool_of(["training", "demo"])} == {"gpu", "cpu", "train"}
    assert {pool.name: pool.limit for pool in POOLS}["train"] == 1
    write_deployments(tmp_path / "prefect.yaml")
    written = yaml.safe_load((tmp_path / "prefect.yaml").read_text())["deployments"]
    source = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    for one, other in zip(written, source, strict=True):
        assert {**one, "work_pool": None} == {**other, "work_pool": None}


def test_only_the_server_learns_where_the_database_is(tmp_path: Path) -> None:
    box = Box(BoxDir(tmp_path), 4300)
    server = server_program(box, postgres.Postgres(box.directory, tmp_path, 5433, None))
    assert "@127.0.0.1:5433/prefect" in server.environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    assert not [name for name in worker_program(box, "gpu").environment if "DATABASE" in name or "PASS" in name]


def test_runs_are_crashed_after_three_missing_heartbeats(tmp_path: Path) -> None:
    heartbeat = client_environment(Box(BoxDir(tmp_path)))["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]
    assert heartbeat == str(HEARTBEAT_S)
    silent = AUTOMATIONS[0].trigger
    assert silent.within.total_seconds() == 3 * HEARTBEAT_S  # type: ignore[union-attr]


def test_variables_survive_a_folder_with_a_space(tmp_path: Path) -> None:
    directory = BoxDir(tmp_path / "my box")
    directory.root.mkdir()
    write_variables(Box(directory, 4300))
    said = subprocess.run(
        ["sh", "-c", f'. "{directory.variables}"; echo "$PREFECT_API_URL"; command -v sdtrain; echo "$no_proxy"'],
        env={"PATH": "/usr/bin:/bin", "no_proxy": "example.org"},
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert said == [
        "http://127.0.0.1:4300/api",
        str(Path(sys.executable).with_name("sdtrain")),
        "127.0.0.1,localhost,example.org",
    ]


def test_commands_on_a_box_that_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SDTRAIN_STATE", str(tmp_path))
    said = {}
    for name in ("down", "status", "deploy"):
        monkeypatch.setattr(sys, "argv", ["box", name])
        said[name] = (command_line.main(), "".join(capsys.readouterr()))
    assert said["down"] == (0, f"The box in {tmp_path} was not up.\n")
    assert said["status"] == (0, f"Down: {tmp_path}\n")
    assert said["deploy"][0] == 2
    assert "is not up. `make up` first" in said["deploy"][1]


def test_up_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "PG_VERSION").write_text("9\n")
    monkeypatch.setenv("SDTRAIN_STATE", str(tmp_path))
    monkeypatch.setenv("SDTRAIN_PORT", str(free_port()))
    monkeypatch.setattr(sys, "argv", ["box", "up"])
    assert command_line.main() == 2
    assert "error: " in (said := capsys.readouterr().err)
    assert "made by PostgreSQL 9" in said
    assert "Traceback" not in said
    assert marked(tmp_path) == set()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
