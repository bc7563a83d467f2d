"""A demo's command ends with its figures on the last line, or with a sentence."""

import json

import pytest

from flows.support.command_line import print_figures
from sdtrain.errors import UserError


def test_the_figures_are_the_last_line(capsys):
    assert print_figures(lambda: {"seconds": 1.5, "report": "page.html"}, look_at="report") == 0
    *_, look, last = capsys.readouterr().out.splitlines()
    assert (look, json.loads(last)) == ("Look at page.html", {"seconds": 1.5, "report": "page.html"})


def test_a_users_error_is_a_sentence_and_any_other_stays_one(capsys):
    def fail(error):
        raise error

    assert print_figures(lambda: fail(UserError("Free some disk.")), look_at="report") == 2
    assert capsys.readouterr().err == "error: Free some disk.\n"
    with pytest.raises(KeyError):
        print_figures(lambda: fail(KeyError("x")), look_at="report")
