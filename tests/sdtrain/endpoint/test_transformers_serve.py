"""The client against `transformers serve` with a tiny model: a real server, its protocol and its refusals."""

import os
import socket
import subprocess
import sys
import time

import pytest

from sdtrain.endpoint.ask import ask, check_endpoint
from sdtrain.endpoint.config import EndpointConfig
from sdtrain.endpoint.messages import Request, jpeg_of
from sdtrain.errors import UserError
from tests.image_fixtures import scene_image
from tests.tiny_captioners import WORDS, cached, write_llava

MODEL = "tiny/captioner"


@pytest.fixture
def served(tmp_path):
    cached(tmp_path / "hub", MODEL, write_llava)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=log, stderr=log)
        try:
            config = EndpointConfig(url=f"http://127.0.0.1:{port}/v1", model=MODEL, concurrency=3)
            until = time.monotonic() + 120
            while not answers(port):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < until, (tmp_path / "log").read_text()
                time.sleep(0.1)
            yield config
        finally:
            process.terminate()
            process.wait()


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_transformers_serve_answers_about_images(served):
    assert check_endpoint(served, "caption.endpoint") == f"{MODEL} at {served.url}"
    images = [jpeg_of(scene_image(seed), 64) for seed in range(4)]
    questions = [Request("describe the image", (image,), max_tokens=40, top_logprobs=5) for image in images]
    first, again = (ask(served, questions, "caption.endpoint") for _ in range(2))
    assert first == again  # asked without sampling
    for answer in first:
        assert answer.kind == "text"
        assert set(answer.text.split()) <= {*WORDS, "user", "assistant", "describe"}
        assert MODEL in answer.model
        assert answer.usage is not None
        assert answer.usage.completion_tokens >= len(answer.text.split())
        assert answer.first_token == {}  # this server refuses to give any, and was asked again without
    (cut,) = ask(served, [Request("describe the image", (images[0],), max_tokens=1)], "caption.endpoint")
    assert cut.kind in ("too_long", "empty")
    with pytest.raises(UserError, match=r"caption\.endpoint\.model: .* does not have 'tiny/captoner'\. Did you mean"):
        check_endpoint(served.model_copy(update={"model": "tiny/captoner"}), "caption.endpoint")
