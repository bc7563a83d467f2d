"""The page in a real browser: asking by words, by a dropped image, and by one that was found."""

import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from filters.search.search import Search
from tests.browser import complaints, open_browser
from tests.filters.removal_fixtures import caption_of, copy_of, make_photo, remove

WAIT_S = 60
DROP = """
const given = new DataTransfer();
given.items.add(new File([Uint8Array.from(arguments[0])], "dropped.jpg", {type: "image/jpeg"}));
const event = new DragEvent("drop", {dataTransfer: given, bubbles: true, cancelable: true});
document.getElementById("drop").dispatchEvent(event);
"""
PAINTED = "return [...document.querySelectorAll('#hits img')].slice(0, 4).every(i => i.complete && i.naturalWidth)"


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@contextmanager
def served(dataset):
    """The address of a page that a process of its own serves."""
    command = [sys.executable, "-m", "sdtrain.cli", "search", str(dataset.root), "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield next(line for line in process.stdout if line.startswith("http://")).split()[0]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def wait_for(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, WAIT_S).until(condition)


def cards(browser):
    """Captions of the cards, once there are some and the first images are painted."""
    found = wait_for(browser, lambda b: b.find_elements("css selector", "#hits .card .caption"))
    wait_for(browser, lambda b: b.execute_script(PAINTED))
    return [element.text for element in found]


@pytest.mark.slow
def test_images_are_found_by_words_by_dropping_one_and_by_their_neighbours(browser, embedded_dataset, tmp_path):
    dataset = copy_of(embedded_dataset, tmp_path)
    with served(dataset) as address:
        _ask_by_words(browser, address)
        browser.save_screenshot(str(tmp_path / "words.png"))
        _drop(browser, 6)
        assert set(cards(browser)[:2]) == {caption_of(6), caption_of(22)}
        assert browser.find_element("css selector", ".asked img").get_property("naturalWidth") > 0
        browser.save_screenshot(str(tmp_path / "dropped.png"))
        _choose(browser, tmp_path / "chosen.jpg", 9)
        assert cards(browser)[0] == caption_of(9)
        browser.find_element("link text", "nearest to this one").click()
        wait_for(browser, lambda b: "like=" in b.current_url)
        assert cards(browser)[0] == caption_of(9)
        assert browser.get_log("browser") == []
        assert complaints(browser, f"{address}?by=words&q=ünïque") == []


@pytest.mark.slow
def test_a_removed_image_is_on_no_page(browser, embedded_dataset, tmp_path):
    dataset = copy_of(embedded_dataset, tmp_path)
    (hit,) = Search(dataset).by_words(caption_of(9), 1)
    remove(dataset, "uid", [hit.uid])
    with served(dataset) as address:
        browser.get(f"{address}?by=words&q=ünïque")
        assert caption_of(9) not in cards(browser)
        _drop(browser, 9)
        assert caption_of(9) not in cards(browser)
        browser.get(f"{address}image/{hit.key}")
        assert "There is no such thing" in browser.page_source


def _ask_by_words(browser, address):
    browser.get(address)
    box = browser.find_element("name", "q")
    box.send_keys(caption_of(20))
    box.submit()
    assert cards(browser)[0] == caption_of(20)
    browser.find_element("css selector", "#hits summary").click()
    assert "/20.jpg" in browser.find_element("css selector", "#hits details a").get_attribute("href")


def _drop(browser, number):
    browser.execute_script(DROP, list(make_photo(number, 70)))
    wait_for(browser, lambda b: "image=" in b.current_url)


def _choose(browser, file, number):
    before = browser.current_url
    file.write_bytes(make_photo(number))
    browser.find_element("id", "file").send_keys(str(file))
    wait_for(browser, lambda b: b.current_url != before)
