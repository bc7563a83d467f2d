"""Imports go one way, between folders too, and the page that shows it is the code's."""

from tests.infra.architecture import PAGE, cycles, folders, page


def test_no_folder_imports_one_that_imports_it():
    assert cycles() == []


def test_the_page_is_that_of_the_code():
    assert PAGE.read_text() == page(), "run `make docs`"


def test_every_folder_says_what_it_is_for_and_none_is_crowded():
    for folder, sentence, num in folders():
        assert sentence.endswith(".") or sentence.endswith(":"), f"{folder}__init__.py has no sentence"
        assert num <= 20, f"{folder} holds {num} modules"
