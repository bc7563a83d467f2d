"""The demo's captioner says what it sees, behind the protocol that the stage `caption` speaks."""

import numpy as np
import pytest
from PIL import Image

from sdtrain.demo.captioner import MODEL, REFUSAL, describe, serve_captioner
from sdtrain.demo.images import SEEN_PAIRS, draw, random_scene
from sdtrain.endpoint.ask import ask, check_endpoint
from sdtrain.endpoint.config import EndpointConfig
from sdtrain.endpoint.messages import Request, jpeg_of


def images():
    for number, pair in enumerate(SEEN_PAIRS):
        rng = np.random.default_rng(number)
        width, height = (int(side) for side in rng.integers(512, 769, 2))
        yield pair, draw(random_scene(rng, *pair), width, height)


def test_it_names_what_is_there() -> None:
    right = [describe(image) == f"a {color} {shape}" for (color, shape), image in images()]
    assert np.mean(right) > 0.9


def test_it_declines_where_nothing_is_to_be_seen() -> None:
    assert describe(Image.new("RGB", (600, 512), "gray")) == REFUSAL


@pytest.mark.timeout(60)
def test_it_answers_the_client() -> None:
    with serve_captioner() as url:
        config = EndpointConfig(url=url, model=MODEL)
        assert MODEL in check_endpoint(config, "caption.endpoint")
        pairs, drawn = zip(*list(images())[:4], strict=True)
        asked = [Request("What is it?", (jpeg_of(image, 512),)) for image in (*drawn, Image.new("RGB", (64, 64)))]
        answers = ask(config, [*asked, Request("No image")], "caption.endpoint")
    assert [answer.text for answer in answers[:4]] == [f"a {color} {shape}" for color, shape in pairs]
    assert [answer.kind for answer in answers[4:]] == ["refused", "rejected"]
