import numpy as np
import pytest

from sdtrain.demo.evaluation import score_images
from sdtrain.demo.images import draw, random_scene
from sdtrain.errors import UserError


def test_the_demos_checker_counts_colours_and_shapes_and_says_which_prompt_it_cannot_judge():
    scene = random_scene(np.random.default_rng(0), "red", "circle")
    image = draw(scene, 64, 64)
    found = score_images([image] * 4, ["a red circle", "a blue circle", "a red star", "a blue star, plain background"])
    assert found.tolist() == [1, 0.5, 0.5, 0]
    with pytest.raises(UserError, match="'two dogs' lacks one"):
        score_images([image], ["two dogs"])
