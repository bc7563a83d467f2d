"""Users are told in a sentence what their machine refuses; everything else stays a traceback."""

import errno
import os
import pwd

import pytest

from sdtrain import cli
from sdtrain.errors import UserError, user_error_of
from sdtrain.models.weights import cache_dir


def refused(number: int, path: object) -> OSError:
    return OSError(number, os.strerror(number), str(path))


def test_a_users_error_is_itself():
    error = UserError("Name a file.")
    assert user_error_of(error) is error


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_what_the_file_system_refuses_is_named_with_its_path(number, tmp_path):
    said = str(user_error_of(refused(number, tmp_path / "a.tar")))
    assert f"{tmp_path}/a.tar cannot be used: {os.strerror(number)}" in said


def test_in_the_home_folder_the_variables_that_lead_elsewhere_are_named(monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null")
    with pytest.raises(NotADirectoryError) as raised:
        (cache_dir() / "weights").mkdir(parents=True)
    said = str(user_error_of(raised.value))
    assert "/dev/null" in said
    assert "set HOME" in said
    assert "SDTRAIN_CACHE" in said


def test_a_user_without_a_home_is_told_to_set_one(monkeypatch):
    """As a container has it that runs under a number of its own."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("SDTRAIN_CACHE", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError) as raised:
        cache_dir()
    assert "Set HOME" in str(user_error_of(raised.value))
    with pytest.raises(KeyError) as raised_by_others:
        pwd.getpwuid(12345)
    assert "Set HOME" in str(user_error_of(raised_by_others.value))


@pytest.mark.parametrize("error", [KeyError("url"), FileNotFoundError(2, "no such file", "x"), RuntimeError("nan")])
def test_a_fault_of_ours_is_none(error):
    assert user_error_of(error) is None


def test_the_command_line_says_it_without_a_traceback(monkeypatch, capsys, tmp_path):
    def build():
        raise refused(errno.EROFS, tmp_path / "data")

    monkeypatch.setattr(cli, "app", build)
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: ")
    assert "Traceback" not in said
