"""The first screen: every number's command gives it again, and what it shows and links to is there."""

import html
import re
import shlex

import pytest
from PIL import Image
from typer.testing import CliRunner

from filters.inspect.report import report_on
from sdtrain.cli import app
from sdtrain.report.page import ImageSection, Report, write_report
from sdtrain.report.summary import Drawn, Facts, Summary, anchor
from sdtrain.training.run_dir import RunDir
from tests.browser import complaints, open_browser


def commands(page: str) -> list[str]:
    found = re.findall(r'<code class="command">(.*?)</code>', page)
    return list(dict.fromkeys(html.unescape(re.sub("<[^>]+>", "", text)) for text in found))


def facts(page: str) -> dict[str, str]:
    return {name: value for value, name in re.findall(r"<li><b>([^<]+)</b>([^<]+)</li>", page)}


@pytest.fixture(scope="module")
def page(dataset, recipe):
    return report_on(dataset, recipe).read_text()


@pytest.fixture(scope="module")
def summarised(dataset, tmp_path_factory):
    """A page with a summary of six images, a training and two curves."""
    folder = tmp_path_factory.mktemp("page")
    run = RunDir(folder / "run")
    run.log.truncate(0)
    for step in range(10, 110, 10):
        run.log.add(step=step, loss=1 / step, images_per_s=100.0)
    drawn = []
    for number in range(6):
        drawn.append((folder / f"{number}.png", f"a prompt of {number}", "new" if number > 2 else ""))
        Image.new("RGB", (64, 64), (40 * number, 90, 120)).save(drawn[-1][0])
    summary = Summary(
        built="A dataset and a network.",
        facts=[Facts([("97 %", "colours right")], "python -m flows.demo --output x")],
        drawn=Drawn(drawn, 'sdtrain sample run "a prompt"'),
        curve="Guidance",
        where="Commands run here.",
    )
    sections = [ImageSection("Guidance", "Scales.", drawn[0][0]), ImageSection("Is anything new?", "", drawn[1][0])]
    train = "deepspeed sdtrain/train.py --config tiny"
    shown = {"summary": summary, "training": run, "training_command": train, "sections": sections}
    return write_report(Report("small", "", dataset, limits={}, **shown), folder / "report.html")


def test_each_count_is_what_its_command_prints(page, dataset, monkeypatch):
    monkeypatch.chdir(dataset.root)
    printed = {}
    for command in commands(page):
        program, *arguments = shlex.split(command)
        assert program == "sdtrain"
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
        assert done.exit_code == 0, done.output
        printed[command] = done.stdout
    assert len(printed) >= 3
    remaining = [line.split()[-1] for line in printed["sdtrain funnel ."].splitlines() if re.search(r"\d *$", line)]
    shown = facts(page)
    assert (shown["rows of the metadata"], shown["kept"]) == (remaining[0], remaining[-1])
    assert {shown["selected"], shown["downloaded"]} <= set(remaining)
    reasons = next(text for command, text in printed.items() if "GROUP BY reason" in command)
    dropped = re.findall(r"Dropped: (\w+) \(([0-9,]+)\)", page)
    assert len(dropped) == 5
    for reason, count in dropped:
        assert re.search(rf"{reason} +{count} ", reasons)


def test_it_shows_numbers_images_with_prompts_curves_and_their_commands(summarised):
    page = summarised.read_text()
    top = page[: page.index("<h2")]
    assert facts(top) == facts(page)
    assert facts(top)["optimizer steps"] == "100"
    assert facts(top)["colours right"] == "97 %"
    assert len(facts(top)) == 7
    assert [command.split()[:2] for command in commands(top)] == [
        ["sdtrain", "funnel"],
        ["deepspeed", "sdtrain/train.py"],
        ["python", "-m"],
        ["sdtrain", "sample"],
    ]
    assert re.findall(r"<b>(a prompt of \d)</b>(\w*)", top) == [(f"a prompt of {i}", "new" * (i > 2)) for i in range(6)]
    images = re.findall(r'src="([^"]+)"', top)
    assert images == [*(f"pictures/drawn-{i}.png" for i in range(6)), "pictures/loss.png", "pictures/0.png"]
    assert all((summarised.parent / image).stat().st_size > 0 for image in images)


def test_its_links_lead_to_sections(summarised):
    page = summarised.read_text()
    linked = re.findall(r'href="#([^"]+)"', page)
    assert {"training", "guidance", "is-anything-new", "the-funnel", "examples"} <= set(linked)
    assert set(linked) <= set(re.findall(r'<h2 id="([^"]+)"', page))


def test_anchors_are_words_with_dashes():
    assert anchor("Is anything memorised?") == "is-anything-memorised"


@pytest.mark.slow
def test_a_browser_finds_nothing_wrong_with_it(summarised, page, dataset):
    with open_browser() as browser:
        assert complaints(browser, summarised.as_uri()) == []
        assert complaints(browser, dataset.report.as_uri()) == []
