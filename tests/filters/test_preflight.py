import shutil
from collections import namedtuple

import pytest
import yaml

from filters.preflight import BuildPreflight, local_checks, network_checks, size_check_before_selection
from filters.recipe import Recipe, load_recipe
from filters.select_config import ListConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import write_entry
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.encode.vae import check_vae
from sdtrain.errors import UserError
from sdtrain.preflight.checks import findings
from tests.filters.select.metadata_fixtures import url, write

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def recipe(tmp_path):
    """The demo's recipe on three rows of metadata."""
    write(tmp_path / "metadata" / "m.parquet", URL=[url(n) for n in range(3)], TEXT=list("abc"))
    demo = load_recipe("demo")
    return demo.model_copy(
        update={"select": demo.select.model_copy(update={"metadata": str(tmp_path / "metadata"), "rules": {}})}
    )


def changed(recipe: Recipe, section: str, **settings: object) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=settings)})


def found_of(dataset, recipe):
    return findings([*local_checks(dataset, recipe), *network_checks(dataset, recipe)])


def problems(dataset, recipe):
    return {finding.name: finding.text for finding in found_of(dataset, recipe) if finding.is_problem}


def test_a_build_that_lacks_nothing_passes_and_says_what_it_found(tmp_path, recipe):
    found = {finding.name: finding for finding in found_of(DatasetDir(tmp_path / "data"), recipe)}
    assert not any(finding.is_problem for finding in found.values())
    assert found["select.metadata"].text == "1 files, 3 rows"
    assert "scaling factor 0.44949" in found["encode.vae"].text
    assert {f"score.{name}_weights" for name in ("clip", "aesthetic", "safety", "watermark")} <= set(found)
    assert not (tmp_path / "data").exists()


def test_everything_that_is_missing_is_said_at_once(tmp_path, recipe):
    recipe = changed(recipe, "encode", vae=str(tmp_path / "no-vae"))
    weights = {"clip_weights": str(tmp_path / "no-clip.pt"), "watermark_weights": "laion-watermrk-v1"}
    recipe = changed(recipe, "score", sscd_weights=str(tmp_path / "no-sscd.pt"), **weights)
    assert set(problems(DatasetDir(tmp_path), recipe)) == {
        "encode.vae",
        "score.clip_weights",
        "score.watermark_weights",
        "score.sscd_weights",
    }
    with pytest.raises(UserError, match="4 things") as raised:
        BuildPreflight(DatasetDir(tmp_path / "data"), recipe)("select", 1, 1)
    assert all(word in str(raised.value) for word in ("no-vae", "no-clip", "laion-watermark-v1"))


def test_a_mistyped_path_or_a_missing_column_is_said_before_weights_are_fetched(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr("filters.preflight.network_checks", lambda *_: pytest.fail("weights were asked for"))
    recipe = changed(recipe, "select", rules={"min_side": 512})
    recipe = changed(recipe, "select", blocklists=[ListConfig(files=str(tmp_path / "no-list.txt"), by="url")])
    with pytest.raises(UserError, match="2 things") as raised:
        BuildPreflight(DatasetDir(tmp_path / "data"), recipe)("select", 1, 1)
    assert all(word in str(raised.value) for word in ("has no column", "no-list.txt"))


def test_a_pinned_digest_that_differs_is_found_before_any_work(tmp_path, recipe):
    file = tmp_path / "clip.pt"
    file.write_bytes(b"x")
    recipe = changed(recipe, "score", clip_weights=str(file), clip_sha256="0" * 64)
    assert "clip_sha256 is 0000" in problems(DatasetDir(tmp_path / "data"), recipe)["score.clip_weights"]


def test_only_what_is_left_to_do_is_checked_and_only_once(tmp_path, recipe, monkeypatch):
    recipe = changed(recipe, "score", clip_weights=str(tmp_path / "gone.pt"))
    preflight = BuildPreflight(DatasetDir(tmp_path), recipe)
    preflight("dedup", 1, 1)  # scores are finished; what made them may be gone
    monkeypatch.setattr("filters.preflight.network_checks", lambda *_: pytest.fail("checked twice"))
    preflight("encode", 1, 1)


def test_the_room_on_disk_is_asked_for_when_the_rows_are_known(tmp_path, recipe, monkeypatch):
    dataset = DatasetDir(tmp_path)
    write_entry(dataset, ShardReport(stage="select", shard=0, num_in=10**6, num_out=10**6))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, 10**9))
    preflight = BuildPreflight(dataset, recipe)
    with pytest.raises(UserError, match=r"The build will take about \d+\.?\d* GB, and 1 GB are free"):
        preflight("download", 4, 4)
    BuildPreflight(dataset, recipe)("download", 1, 1000)  # nearly all of it is written already


def test_of_rows_that_are_not_selected_yet_too_little_room_is_only_a_warning(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, 1))
    (finding,) = findings([size_check_before_selection(DatasetDir(tmp_path), recipe)])
    assert not finding.is_problem
    assert "warning" in finding.text
    (finding,) = findings([size_check_before_selection(DatasetDir(tmp_path), changed(recipe, "select", limit=2))])
    assert finding.is_problem


def test_a_folder_that_cannot_be_written_is_named(tmp_path, recipe):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in problems(DatasetDir(tmp_path / "file" / "data"), recipe)["output"]


def test_a_vae_that_makes_other_latents_is_refused(tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="makes 4 channels of 64 x 64"):
        check_vae(str(tmp_path / "other"))


def test_a_build_with_a_vae_that_cannot_be_loaded_does_not_even_select(tmp_path, recipe, monkeypatch, capsys):
    import sys

    from sdtrain import cli

    file = tmp_path / "mine.yaml"
    content = changed(recipe, "encode", vae=str(tmp_path / "no-vae")).model_dump(mode="json")
    file.write_text(yaml.safe_dump(content))
    monkeypatch.setattr(sys, "argv", ["sdtrain", "build", str(file), "--output", str(tmp_path / "data")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "no-vae" in capsys.readouterr().err
    assert not DatasetDir(tmp_path / "data").selection(0).parent.exists()
