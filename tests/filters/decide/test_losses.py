"""What drops nearly everything is said at the end of its stage and in the report, with the likely cause."""

import pytest

from filters.build import Build
from filters.build_options import BuildOptions
from filters.decide.losses import heavy_losses
from filters.inspect.report import report_on
from filters.inspect.views import write_views
from filters.recipe import Recipe
from sdtrain.dataset.progress import StageTotals
from sdtrain.dataset.stage import run_batch
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads

NO_MODELS = dict.fromkeys(("clip_weights", "aesthetic_weights", "watermark_weights", "safety_weights"))


def row(stage, reason, dropped, remaining):
    return {
        "stage": stage,
        "reason": reason,
        "meaning": f"what {reason} is",
        "dropped": dropped,
        "remaining": remaining,
    }


def warned(stage, reason, dropped, remaining, **sections):
    return heavy_losses([row(stage, reason, dropped, remaining)], Recipe(name="small", **sections))


@pytest.mark.parametrize(
    ("stage", "reason", "dropped", "remaining", "cause"),
    [
        ("decide", "duplicate_semantic", 2999, 1, "semantic_threshold may be too low"),
        ("decide", "duplicate_copied", 2999, 1, "copy_similarity may be too low"),
        ("decide", "duplicate_perceptual", 95, 5, "radius"),
        ("decide", "min_aesthetic", 20, 0, "aesthetic goes from 1 to 10"),
        ("decide", "min_entropy", 100, 1, "0 to 8 bits"),
        ("decide", "aesthetic_missing", 100, 1, "decide.decide_by"),
        ("select", "max_watermark", 98, 2, "pwatermark goes from 0 to 1"),
        ("select", "pwatermark_missing", 98, 0, "null_policy"),
        ("select", "url_not_allowed", 1000, 2, "select.columns"),
        ("select", "not_allowlisted", 1000, 2, "`by`"),
        ("download", "http_403", 96, 4, "download.contact"),
        ("download", "tls_failed", 96, 4, "network"),
        ("score", "undecodable", 96, 4, "damaged"),
        ("masks", "no_mask", 96, 4, "reason = 'no_mask'"),
    ],
)
def test_nearly_everything_dropped_for_one_reason_is_said_with_its_likely_cause(
    stage, reason, dropped, remaining, cause
):
    (sentence,) = warned(stage, reason, dropped, remaining)
    assert f"{stage}: {reason} dropped {dropped:,} of the {dropped + remaining:,}" in sentence
    assert cause in sentence


@pytest.mark.parametrize(
    ("stage", "reason", "dropped", "remaining"),
    [
        ("decide", "min_aesthetic", 94, 6),
        ("decide", "duplicate_exact", 19, 0),  # too few to tell
        ("select", "min_side", 97, 3),  # as laion-high-resolution does of laion5B
        ("select", "over_limit", 10**9, 10),
        ("decide", "removed", 100, 1),
    ],
)
def test_what_may_be_meant_is_not_warned_of(stage, reason, dropped, remaining):
    assert warned(stage, reason, dropped, remaining) == []


def test_scores_of_random_networks_are_named_as_the_cause_where_they_decide():
    random = {"clip_weights": "random:0", "aesthetic_weights": "random:1"}
    (semantic,) = warned("decide", "duplicate_semantic", 2999, 1, score=random)
    assert "score.clip_weights is random" in semantic
    (copied,) = warned("decide", "duplicate_copied", 2999, 1, score={"sscd_weights": "random-full:0"})
    assert "score.sscd_weights is random" in copied
    (ours,) = warned("decide", "min_aesthetic", 99, 1, score=random, decide={"decide_by": "image"})
    assert "score.clip_weights and score.aesthetic_weights are random" in ours
    (metadata,) = warned("decide", "min_aesthetic", 99, 1, score=random)
    assert "random" not in metadata


def test_each_rule_is_measured_by_what_came_to_it():
    rows = [row("select", "", 0, 100_000), row("select", "min_side", 99_900, 100), row("select", "max_unsafe", 99, 1)]
    assert [sentence.split()[1] for sentence in heavy_losses(rows, Recipe(name="small"))] == ["min_side", "max_unsafe"]


def test_a_build_warns_when_the_stage_has_ended_and_its_report_does_too(tmp_path):
    recipe = Recipe(name="small", score=NO_MODELS, duplicates={"level": "exact"})
    copies = [Fetched(encoded(scene_image(1)), original_px=(600, 600)) for _ in range(24)]
    dataset = write_downloads(tmp_path, copies)
    said = []

    def run_stage(stage):
        if stage.name in ("score", "dedup", "decide"):
            run_batch(stage, dataset, recipe, stage.shards(dataset, recipe))
            said.append(stage.name)
            return StageTotals(stage.name, num_shards=1)
        return StageTotals(stage.name)

    Build(dataset, recipe, BuildOptions(), "", lambda *_: None).run(run_stage, lambda: None, said.append)
    assert said[:3] == ["score", "dedup", "decide"]
    assert "duplicate_exact dropped 23 of the 24" in said[3]
    write_views(dataset, recipe)
    assert "duplicate_exact dropped 23 of the 24" in report_on(dataset, recipe).read_text()
