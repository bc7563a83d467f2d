import numpy as np
import pytest

from sdtrain.evaluation.distances import half_width_of_mean
from sdtrain.evaluation.judging.questions import JudgedPrompt
from sdtrain.evaluation.judging.scores import Judged, breakdown, ratio, scores

NAN = float("nan")


def judged(skills, *probabilities, atoms=None):
    pairs = [("Is it?", "Yes")] * len(skills)
    prompt = JudgedPrompt(prompt="x", vqa_list=pairs, skills=skills, atom_count=atoms)
    return Judged(prompt, np.array(probabilities))


IMAGES = [
    judged(["object", "count"], 0.9, 0.4, 0.7, atoms=3),
    judged(["object", "object", "count"], 0.5, 0.5, 0.0, 0.2, atoms=3),
    judged(["object"], 0.8, 0.3, atoms=4),
]


def test_the_means_are_those_of_the_paper():
    found = scores(IMAGES)
    assert found["soft_tifa_am"] == pytest.approx(np.mean([0.65, 1 / 3, 0.8]))
    assert found["soft_tifa_gm"] == pytest.approx(np.mean([0.6, 0.0, 0.8]))  # sqrt(0.9 x 0.4) = 0.6
    assert found["vqa_score"] == pytest.approx(0.4)
    assert found["soft_tifa_gm_ci95"] == pytest.approx(half_width_of_mean(np.array([0.6, 0.0, 0.8])))


def test_skills_pool_their_questions_and_numbers_of_atoms_their_prompts():
    rows = {row["group"]: row for row in breakdown(IMAGES)}
    assert list(rows) == ["object", "count", "3 atoms", "4 atoms"]
    assert (rows["object"]["num"], rows["object"]["number"]) == (4, "soft_tifa_am")
    assert rows["object"]["value"] == pytest.approx(np.mean([0.9, 0.5, 0.5, 0.8]))
    assert rows["count"]["value"] == pytest.approx(0.2)
    assert (rows["3 atoms"]["num"], rows["3 atoms"]["value"]) == (2, pytest.approx(0.3))


def test_a_question_without_an_answer_counts_nowhere():
    images = [judged(["object", "count"], 0.9, NAN, 0.5), judged(["object"], NAN, NAN), judged(["object"], 0.4, 1.0)]
    found = scores(images)
    assert found["soft_tifa_am"] == pytest.approx(0.65)
    assert found["vqa_score"] == pytest.approx(0.75)
    rows = {row["group"]: row for row in breakdown(images)}
    assert rows["object"]["num"] == 2
    assert rows["count"]["value"] is None


def test_the_interval_of_a_skill_is_that_of_independent_prompts():
    values = np.random.default_rng(0).uniform(size=200)
    single, tripled = ([np.repeat(value, times) for value in values] for times in (1, 3))
    assert ratio(single) == pytest.approx((values.mean(), half_width_of_mean(values)))
    assert ratio(tripled) == pytest.approx(ratio(single))  # a question repeated says nothing new
    rng = np.random.default_rng(1)

    def draw():
        return [rng.uniform(size=rng.integers(1, 4)) * rng.uniform(0.5, 1) for _ in range(100)]

    draws = [ratio(draw()) for _ in range(400)]
    deviation = np.std([value for value, _ in draws])
    assert np.mean([half for _, half in draws]) == pytest.approx(1.96 * deviation, rel=0.1)
