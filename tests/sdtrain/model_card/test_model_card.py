import json
import sys

import markdown
import pytest
import yaml
from huggingface_hub import ModelCard

from sdtrain import cli
from sdtrain.config import load_config
from sdtrain.errors import UserError
from sdtrain.impact.energy import EnergyLog, Spent
from sdtrain.model_card import write_card
from sdtrain.model_card.records import DatasetFacts, dataset_facts
from sdtrain.train import train
from sdtrain.training.run_dir import RunDir
from tests.training_fixtures import write_config


def make_run(folder, name="run", steps=8, hours=150_000.0, **changes):
    """A run's records without its training: an A100 PCIe at the data sheet's power."""
    changes = {"card": {"region": "aws/us-east"}} | changes
    config = load_config(str(write_config(folder / f"{name}.yaml", folder, folder / "data", steps=steps, **changes)))
    run = RunDir(folder / name)
    run.begin(config, 0)
    (run.path / "DONE").write_text(json.dumps({"step": steps, "checkpoint": "c"}))
    known = (hours, 0.0, 0.0, hours, hours, 0.0, 0.0)
    EnergyLog(run.path / "energy.csv").add(Spent("a", steps, "NVIDIA A100-PCIE-40GB", 256, 32, 1, *known))
    return run.path


def write_dataset(root):
    import duckdb

    root.mkdir(exist_ok=True)
    recipe = {
        "name": "pretty",
        "description": "large images",
        "select": {"metadata": "hf://datasets/org/meta/*.parquet", "rules": {"min_side": 512}},
        "duplicates": {"level": "exact"},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with duckdb.connect(str(root / "metadata.duckdb")) as connection:
        connection.execute("CREATE TABLE funnel(stage TEXT, reason TEXT, meaning TEXT, dropped INT, remaining INT)")
        connection.execute(
            "INSERT INTO funnel VALUES ('select', '', 'rows', 0, 1000), ('select', 'min_side', 'a|b', 600, 400)"
        )
        connection.execute("CREATE TABLE stages AS SELECT 'download' AS stage, 7200.0 AS seconds")
        connection.execute("INSERT INTO stages VALUES ('encode', 3600.0)")


def front_matter(path):
    return yaml.safe_load(path.read_text().split("---\n")[1])


def row_of(card, name):
    """The cells of a row of the table of the training procedure: this run's, and the original's."""
    line = next(line for line in card.read_text().splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_hubs_name_of_metadata_is_without_its_revision():
    for metadata in ("hf://datasets/org/meta/*.parquet", "hf://datasets/org/meta@~parquet/default/*.parquet"):
        assert DatasetFacts(root="x", metadata=metadata).hub_id == "org/meta"


def test_differences_from_the_original_run_are_listed(tmp_path):
    write_dataset(tmp_path / "data")
    (tmp_path / "data" / "latents").mkdir()
    info = {"resize": "shorter side, bicubic, random crops", "num_crops": 4}
    (tmp_path / "data" / "latents" / "info.json").write_text(json.dumps(info))
    card = write_card(make_run(tmp_path, precision="bf16"))
    ours, theirs = row_of(card, "precision")
    assert "text encoder too, in bf16;" in ours
    assert "fp32, with TF32 matrix products" in theirs
    ours, theirs = row_of(card, "crops")
    assert ours == "shorter side, bicubic, random crops (4 of each image, one an epoch)"
    assert theirs == "resized, then a random crop, new whenever an image was seen"
    again = write_card(make_run(tmp_path, name="online", precision="fp32", data={"online_vae": True}))
    assert "fp32 (TF32 matrix products on GPUs)" in row_of(again, "precision")[0]
    assert row_of(again, "crops")[0] == "resized, then a random crop, new whenever an image is seen"


def test_imported_images_are_said_to_be_the_publishers(tmp_path):
    write_dataset(tmp_path / "data")
    assert "LAION's metadata is CC-BY-4.0" in write_card(make_run(tmp_path)).read_text()
    recipe = {"name": "mine", "description": "photographs", "source": {"path": "/private/place", "name": "holiday"}}
    (tmp_path / "data" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = write_card(make_run(tmp_path)).read_text()
    assert 'photographs. Imported from images that the publisher of this model had, "holiday"' in text
    assert "/private/place" not in text
    assert "LAION's metadata is" not in text


def test_the_hub_reads_what_it_expects(tmp_path):
    write_dataset(tmp_path / "data")
    data = ModelCard.load(write_card(make_run(tmp_path))).data.to_dict()
    assert data["license"] == "creativeml-openrail-m"
    assert data["tags"] == ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image"]
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert data["datasets"] == ["org/meta"]
    assert (data["language"], data["inference"]) == (["en"], True)
    assert list(data["extra_gated_fields"].values()) == ["checkbox"]


def test_the_emissions_of_sd_v1_come_out_with_the_data_beside_them(tmp_path):
    write_dataset(tmp_path / "data")
    path = write_card(make_run(tmp_path))
    text = path.read_text()
    assert "| Training of this run | 150,000 GPU-hours | 37,500 | 11,250 |" in text
    assert "estimated with 250 W a GPU" in text
    assert "| Data preparation: pretty | 3 worker-hours | 0.021 | 0.0063 |" in text  # 3 h of one core at 7 W
    assert front_matter(path)["co2_eq_emissions"]["emissions"] == pytest.approx(11_250_006.3)


def test_a_gpu_of_the_data_stages_counts_while_they_use_it(tmp_path):
    write_dataset(tmp_path / "data")
    card = {"region": "aws/us-east", "data_gpu": "H200"}
    assert "| 3 worker-hours | 0.721 | 0.2163 |" in write_card(make_run(tmp_path, card=card)).read_text()


def test_without_a_region_there_is_energy_and_no_co2(tmp_path):
    path = write_card(make_run(tmp_path, card={}))
    assert "| 37,500 | not known |" in path.read_text()
    assert "names no region" in path.read_text()
    assert "co2_eq_emissions" not in front_matter(path)


def test_an_unknown_region_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match=r"card\.region.*no region 'aws/nowhere'"):
        make_run(tmp_path, card={"region": "aws/nowhere"})


def test_recipe_and_funnel_are_told_even_when_the_dataset_has_gone(tmp_path):
    write_dataset(tmp_path / "data")
    run = make_run(tmp_path)
    first = write_card(run).read_text()
    assert "| select | min_side | a\\|b | 600 | 400 |" in first
    assert "`min_side: 512`" in first
    (tmp_path / "data").rename(tmp_path / "moved")
    assert write_card(run).read_text() == first


def test_what_is_not_recorded_is_said_to_be_not_recorded(tmp_path):
    run = make_run(tmp_path)
    (run / "energy.csv").unlink()
    (run / "DONE").unlink()
    text = write_card(run).read_text()
    for sentence in (
        "The counts of its stages are not recorded",
        "| Training of this run | not recorded | not known | not known | not recorded |",
        "The number of steps done is not recorded",
        "Not evaluated yet",
    ):
        assert sentence in text


def test_the_chain_is_told_from_its_beginning_and_its_energy_counts(tmp_path):
    write_dataset(tmp_path / "data")
    make_run(tmp_path, "first", hours=1000, init_from="org/published")
    make_run(tmp_path, "second", hours=2000, init_from="runs/first")
    path = write_card(make_run(tmp_path, "third", hours=3000, init_from=str(tmp_path / "second")))
    text = path.read_text()
    assert text.index("1. org/published: no run") < text.index("2. ") < text.index("4. ")
    assert f"| Training before: {tmp_path / 'first'} | 1,000 GPU-hours | 250 | 75 |" in text
    assert "| Training before: org/published | not recorded |" in text
    assert "co2_eq_emissions" not in front_matter(path)  # a part of a chain is no total


def test_the_evaluation_is_shown_with_its_protocol(tmp_path):
    run = make_run(tmp_path)
    (run / "evaluation").mkdir()
    rows = [{"model": "run", "guidance_scale": 3.0, "fid": 21.23456, "fid_interval": [20.0, 22.5]}]
    rows[0] |= {"recall": 0.5, "recall_ci95": 0.0321, "kid": 0.01, "kid_std": 0.001, "coverage": None}
    digests = {"inception": "ab12", "dinov2": "cd34"}
    results = {
        "protocol": {"num_prompts": 16, "sampler": "plms", "networks_sha256": digests},
        "metrics": {"fid": "distance"},
        "rows": rows,
    }
    (run / "evaluation" / "results.json").write_text(json.dumps(results | {"notes": ["2 of 16 prompts are known."]}))
    (run / "evaluation" / "curve.png").write_bytes(b"")
    text = write_card(run).read_text()
    assert "- 2 of 16 prompts are known.\n" in text
    assert "| model | guidance_scale | fid | fid_interval | recall | kid |" in text
    assert "| run | 3 | 21.23 | 20 to 22.5 | 0.5 ± 0.032 | 0.01 ± 0.001 |" in text
    assert "num_prompts 16, sampler plms, networks_sha256 inception ab12, dinov2 cd34" in text
    assert "(evaluation/curve.png)" in text
    (run / "evaluation" / "results.json").write_text("{}")
    with pytest.raises(UserError, match=r"results\.json"):
        write_card(run)


def test_the_hub_reads_the_evaluation(tmp_path):
    run = make_run(tmp_path)
    assert "model-index" not in front_matter(write_card(run))
    (run / "evaluation").mkdir()
    rows = [{"model": "run", "guidance_scale": scale, "fid": 20.0 + scale, "fid_ci95": 1.0} for scale in (1.5, 3.0)]
    results = {"protocol": {"reference_source": "val2017"}, "metrics": {"fid": "distance"}, "rows": rows}
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    data = ModelCard.load(write_card(run)).data
    assert [(r.metric_type, r.metric_value, r.metric_args) for r in data.eval_results] == [
        ("fid", 21.5, {"guidance_scale": 1.5}),
        ("fid", 23.0, {"guidance_scale": 3.0}),
    ]
    assert {(r.task_type, r.dataset_name) for r in data.eval_results} == {("text-to-image", "val2017")}
    rows[1]["model"] = "another"  # their numbers are not this run's
    (run / "evaluation" / "results.json").write_text(json.dumps(results))
    assert "model-index" not in front_matter(write_card(run))


def test_every_table_is_a_table_in_html(tmp_path):
    write_dataset(tmp_path / "data")
    body = ModelCard.load(write_card(make_run(tmp_path))).text
    html = markdown.markdown(body, extensions=["tables", "fenced_code"])
    assert html.count("<table>") == 3
    assert "|---" not in html


@pytest.mark.slow
def test_a_stopped_and_resumed_run_has_a_card_of_both_sessions(tmp_path, world, ranks):
    config = load_config(str(write_config(tmp_path / "c.yaml", *world)))
    asked = iter(range(4))
    train(config, RunDir(tmp_path / "run"), ranks, stop_requested=lambda: next(asked, None) is None)
    assert "**Not finished: 4 of 8 steps are done.**" in (tmp_path / "run" / "README.md").read_text()
    train(config, RunDir(tmp_path / "run"), ranks)
    text = (tmp_path / "run" / "README.md").read_text()
    assert "2 sessions; CPUs: " in text
    assert "Training reached its last step, 8." in text
    assert [s.step for s in EnergyLog(tmp_path / "run" / "energy.csv").sessions()] == [4, 8]


def test_the_command_says_where_the_card_is_and_what_is_no_run(tmp_path, monkeypatch, capsys):
    for folder, code in ((make_run(tmp_path), 0), (tmp_path, 2)):
        monkeypatch.setattr(sys, "argv", ["sdtrain", "card", str(folder)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == code
    captured = capsys.readouterr()
    assert captured.out.strip().endswith("run/README.md")
    assert "holds no training run" in captured.err


def test_records_that_call_decide_keep_are_read(tmp_path):
    import duckdb

    root = tmp_path / "data"
    write_dataset(root)
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"keep": {"rules": {"max_border": 0.3}}}))
    with duckdb.connect(str(root / "metadata.duckdb")) as connection:
        connection.execute("INSERT INTO funnel VALUES ('keep', 'max_border', 'a frame', 100, 300)")
        connection.execute("INSERT INTO stages VALUES ('keep', 1800.0)")
    facts = dataset_facts(root)
    assert facts.decide_rules == {"max_border": 0.3}
    assert facts.funnel[-1] == ("decide", "max_border", "a frame", 100, 300)
    assert facts.stage_hours["decide"] == 0.5
