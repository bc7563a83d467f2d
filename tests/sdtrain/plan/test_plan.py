import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from filters.recipe import known_recipes
from sdtrain import cli
from sdtrain.config import load_config
from sdtrain.dataset.work import WORK
from sdtrain.errors import UserError
from sdtrain.plan import measured
from sdtrain.plan.chain import CHAINS, chain, configs_of, find_chain
from sdtrain.plan.estimate import DatasetJob, Machines, Planner, latent_bytes, total
from sdtrain.plan.rates import load_rates

RESULTS = (Path(__file__).parents[2] / "benchmarks" / "RESULTS.md").read_text()
MEASURED = {name: rate for name, rate in load_rates().items() if rate.kind == "measured"}


@pytest.fixture
def plan(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sdtrain", "plan", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


@pytest.mark.parametrize("name", MEASURED)
def test_a_measured_rate_is_what_the_results_say(name):
    rate = MEASURED[name]
    section = RESULTS[RESULTS.index(f"`{rate.section}`") :]
    assert rate.quote in section[: section.find("| `python", 1)]
    assert rate.value == pytest.approx(rate.amount / rate.seconds / rate.cores, rel=1e-6)
    number = rate.seconds if rate.seconds != 1 else rate.amount
    assert f"{number:g}" in rate.quote


def test_every_other_rate_says_where_it_is_from():
    assert all(rate.source for rate in load_rates().values() if rate.kind != "measured")


def test_hours_disk_money_and_emissions_follow_from_the_rates():
    rates = load_rates(
        ["link_rot=0.5", "score_images=100", "encode_pictures=50", "cpu_cores=10"]
    )  # one by its old name
    machines = Machines(4, "h200", kg_per_kwh=0.5, price_per_gpu_hour=2.0)
    lines = {
        line.stage: line for line in Planner(rates, machines).dataset(DatasetJob("mine", 512, 512, 2, 3_600_000), WORK)
    }
    assert lines["score"].num == 1_800_000
    assert (lines["score"].gpu_hours, lines["score"].hours, lines["score"].cost) == (5, 1.25, 10)
    assert lines["score"].kg == pytest.approx(5 * 0.7 * 0.5)
    assert lines["encode"].num == 3_600_000  # two crops of each image
    assert lines["encode"].disk_bytes == 3_600_000 * 65_536
    assert lines["download"].core_hours == pytest.approx(1000 / 17.4)
    assert lines["download"].hours == pytest.approx(100 / 17.4)
    assert total(list(lines.values())).gpu_hours == 5 + lines["encode"].gpu_hours


def test_rows_of_a_url_that_lie_together_are_fetched_once():
    planner = Planner(load_rates(["urls_per_row=0.8"]), Machines(1, "h200"))
    apart, together = (
        planner.dataset(DatasetJob("mine", 512, 512, 1, 1_000_000, has_urls_together=has), WORK)
        for has in (False, True)
    )
    changed = [(before, line) for before, line in zip(apart, together, strict=True) if before != line]
    ((before, line),) = changed
    assert (before.num, line.stage, line.num) == (1_000_000, "download", 800_000)
    assert line.core_hours == pytest.approx(0.8 * before.core_hours)
    assert line.disk_bytes == before.disk_bytes
    assert "urls_per_row 0.8" in line.remarks[0]


CAPTIONED = """
name: captioned
caption:
  endpoint: {url: "http://127.0.0.1:8000/v1", model: llava, prompt_price: 2, completion_price: 8}
  max_tokens: 100
decide:
  rules: {ask: ["Is there a text?", "Is it a drawing?", "Is it blurred?"]}
"""


def test_requests_about_images_are_counted_and_unknown_rates_are_named(plan, tmp_path):
    recipe = tmp_path / "captioned.yaml"
    recipe.write_text(CAPTIONED)
    rows = "--recipe", recipe, "--rows", 1_000_000, "--assume", "link_rot=0.5"
    _, out, _ = plan(*rows)
    assert "caption: not known: state --assume caption_requests=N, in requests/s" in out
    assert "not in the hours, nor in what follows from them: caption, ask" in out
    assert "1,000,000 requests, 2 about each image; their tokens and price depend on the network, an answer at" in out
    assert "1,500,000 requests, 3 about each image" in out
    speeds = "--assume", "caption_requests=100", "--assume", "ask_requests=50"
    tokens = "--assume", "caption_prompt_tokens=300", "--assume", "caption_completion_tokens=50"
    _, out, _ = plan(*rows, *speeds, *tokens, "--json")
    lines = {line["stage"]: line for line in json.loads(out)["lines"]}
    assert list(lines)[3:7] == ["dedup", "caption", "ask", "pack"]
    assert lines["caption"]["hours"] == pytest.approx(1_000_000 / 100 / 3600)
    assert (lines["ask"]["num"], lines["ask"]["hours"]) == (1_500_000, pytest.approx(1_500_000 / 50 / 3600))
    assert lines["ask"]["gpu_hours"] == 0  # the server is none of the plan's machines
    # 300 million tokens at 2 dollars a million, and 50 million at 8.
    assert "300,000,000 tokens of questions and 50,000,000 of answers, 1,000.00 US" in lines["caption"]["remarks"][0]


def test_a_captioner_on_the_machines_takes_their_gpus(plan, tmp_path):
    recipe = tmp_path / "captioned.yaml"
    recipe.write_text("name: captioned\ncaption: {model: {name: folder}, prompts: {short: '<CAPTION>'}}\n")
    arguments = "--recipe", recipe, "--rows", 7200, "--assume", "link_rot=0", "--assume", "caption_model=2"
    _, out, _ = plan(*arguments, "--gpus", 2, "--json")
    line = next(line for line in json.loads(out)["lines"] if line["stage"] == "caption")
    assert (line["num"], line["gpu_hours"], line["hours"]) == (7200, 1, 0.5)


def test_texts_of_duplicates_ask_nobody_and_are_named_as_not_counted(plan, tmp_path):
    recipe = tmp_path / "captioned.yaml"
    recipe.write_text("name: captioned\nduplicates: {level: exact}\ncaption: {from_duplicates: true}\n")
    _, out, _ = plan("--recipe", recipe, "--rows", 1000)
    assert "not counted, as their rates are not known: caption, decide" in out


def test_latents_are_as_large_as_the_encode_stage_writes_them():
    import numpy as np

    assert latent_bytes(512) == np.zeros((8, 64, 64), np.float16).nbytes


def test_without_price_and_region_there_is_neither_money_nor_co2():
    line = total(Planner(load_rates(), Machines(8, "h100")).dataset(DatasetJob("mine", 256, 256, 1, 10), WORK))
    assert (line.cost, line.kg) == (None, None)


def test_the_chain_sees_as_many_images_as_the_model_card_says():
    planner = Planner(load_rates(), Machines(8, "h200"))
    lines = [planner.training(run) for run in configs_of(find_chain("v1-4"))]
    assert sum(line.num for line in lines) == 2048 * (237_000 + 194_000 + 515_000 + 225_000)
    # 4.87e21 FLOP, and 35 % (MLPerf's share, sdtrain's reckoning of it) of 989 TFLOP/s; the host keeps 256 px below.
    assert sum(line.gpu_hours for line in lines) == pytest.approx(4.87e21 / (0.35 * 989e12) / 3600, rel=0.03)


def test_few_images_for_each_gpu_are_said_and_reckoned_with():
    config = load_config("sd-v1-2")
    few, many = (Planner(load_rates(), Machines(num, "h200")).training(config) for num in (32, 256))
    assert few.remarks == ()
    assert many.gpu_hours > 1.25 * few.gpu_hours
    assert "leaves each of 256 GPUs 8 images a step, so micro-batches of 8" in many.remarks[0]
    stated = Planner(load_rates(["train_h200_512=200"]), Machines(256, "h200")).training(config)
    assert stated.gpu_hours == pytest.approx(config.steps * 2048 / 200 / 3600)
    assert (stated.source, stated.remarks) == ("stated: yours", ())


def test_chains_begin_where_their_configs_do():
    assert set(CHAINS) == {"v1-1", "v1-2", "v1-3", "v1-4", "v1-5"}
    for last in CHAINS.values():
        for before, after in pairwise(chain(last)):
            assert load_config(after.name).init_from == f"runs/{before.name}"
            assert after.recipe in known_recipes()


def test_the_command_prints_every_stage_with_its_source(plan):
    code, out, _ = plan(
        *("--recipe", "laion-aesthetics", "--gpus", 256, "--gpu", "H200"),
        *("--rows", 1_000_000, "--region", "aws/us-east-1", "--price-per-gpu-hour", 3),
    )
    assert code == 0
    for part in ("select", "encode", "sd-v1-2", "cost", "kg CO2", " 650,000 ", "assumed", "published", "measured"):
        assert part in out
    assert "measured by us: select, download, dedup; published by others: score, encode, sd-v1-2; assumed: pack" in out
    assert "no figure beyond 64 GPUs" in out


def test_a_chain_is_shown_beside_the_hours_of_the_model_card(plan):
    _, out, _ = plan("--chain", "v1-4", "--gpus", 8, "--json")
    hours = sum(line["gpu_hours"] for line in json.loads(out)["lines"] if line["stage"] == "train")
    _, out, _ = plan("--chain", "v1-4", "--gpus", 8)
    assert f"training up to v1-4: {hours:,.0f} H200-hours" in out
    assert "SD v1's model card: 150,000 A100-hours" in out


def test_as_json_it_has_lines_and_rates(plan):
    _, out, _ = plan("--chain", "v1-4", "--json", "--assume", "link_rot=0.4")
    content = json.loads(out)
    assert content["rates"]["link_rot"] == {"value": 0.4, "unit": "share", "kind": "stated", "source": "yours",
                                            "section": "", "quote": ""}  # fmt: skip
    assert content["lines"][-1]["part"] == "all"
    assert next(line["num"] for line in content["lines"] if line["stage"] == "score") == pytest.approx(1.324e9 * 0.6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--recipe", "laion-aesthetic"], "Did you mean 'laion-aesthetics'"),
        (["--recipe", "demo", "--gpu", "h300"], "Did you mean 'h200'"),
        (["--chain", "v1-4", "--assume", "train_h20_512=9"], "Did you mean 'train_h200_512'"),
        (["--chain", "v1-4", "--gpus", 6], "Use global_batch_size 1920 or 2304, or another number of ranks"),
        (["--chain", "v1-9"], "no chain 'v1-9'"),
        (["--chain", "v1-4", "--assume", "link_rott=1"], "Did you mean 'link_rot'"),
        (["--chain", "v1-4", "--assume", "link_rot=2"], "a share from 0 to 1"),
        (["--chain", "v1-4", "--assume", "cpu_cores=no"], "a number above 0, in cores"),
        (["--chain", "v1-4", "--region", "aws/us-est-1"], "aws/us-east-1"),
        (["--recipe", "demo"], "Give --rows N"),
        ([], "Give --recipe NAME"),
    ],
)
def test_what_cannot_be_reckoned_is_a_sentence(plan, arguments, sentence):
    code, _, err = plan(*arguments)
    assert (code, err.startswith("error: ")) == (2, True)
    assert sentence in err


def test_the_page_shows_what_the_command_says_without_measurements_of_ours(plan, monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "MEASURED", tmp_path / "none.json")
    page = (Path(__file__).parents[3] / "docs" / "planning.md").read_text()
    shown = page[page.index("$ sdtrain plan --chain") :]
    command, *lines = shown[: shown.index("```")].splitlines()
    _, out, _ = plan(*command.split()[3:])
    assert [line for line in lines if line != " …"] == [
        line.rstrip() for line in out.splitlines() if line.rstrip() in lines
    ]
    for gpus in ("64", "256"):
        _, out, _ = plan("--chain", "v1-4", "--gpus", gpus)
        hours = next(line for line in out.splitlines() if line.startswith("training up to v1-4: ")).split()[4]
        assert f"{hours} H200-hours" in shown


def test_a_resolution_without_a_rate_is_a_sentence():
    config = load_config("sd-v1-2").model_copy(update={"data": load_config("tiny").data})
    with pytest.raises(UserError, match="64 px"):
        Planner(load_rates(), Machines(1, "a100")).training(config)
