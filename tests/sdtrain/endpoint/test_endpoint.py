"""The client against a server with every fault that real ones have."""

import asyncio
import io
import json
import threading
import time
from dataclasses import replace
from email.utils import formatdate

import numpy as np
import pytest
from PIL import Image

from sdtrain import redaction
from sdtrain.endpoint import client
from sdtrain.endpoint.answer_log import AnswerLog, forget_images
from sdtrain.endpoint.answers import Answer, Usage, answer_of_record
from sdtrain.endpoint.ask import ask, check_endpoint
from sdtrain.endpoint.budget import Budget, usage_in
from sdtrain.endpoint.config import EndpointConfig
from sdtrain.endpoint.messages import Request, jpeg_of
from sdtrain.errors import UserError
from sdtrain.settings import parse_settings
from tests.chat_server import MODEL, Reply, chat_server, completion, error

SECTION = "caption.endpoint"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(client, "backoff_s", lambda attempt: 0.0)
    monkeypatch.setattr(client, "_given_up", {})


def config_of(server, **settings):
    return EndpointConfig(url=server.url, model=MODEL, **settings)


def requests(number):
    return [Request(f"question {n}") for n in range(number)]


def once(first, then):
    """Gives each question a fault at first."""
    seen, lock = set(), threading.Lock()

    def reply(asked):
        with lock:
            is_new = asked.prompt not in seen
            seen.add(asked.prompt)
        return first if is_new else then(asked)

    return reply


def echo(asked):
    return completion(f"answer to {asked.prompt}")


def test_answers_come_in_order_with_bounded_concurrency_and_lazily_taken_requests():
    taken, ahead = 0, []

    def lazily():
        nonlocal taken
        for request in requests(40):
            taken += 1
            yield request

    def reply(asked):
        ahead.append(taken - len(server.asked))
        return replace(echo(asked), pause_s=0.02 if asked.prompt.endswith("0") else 0)

    came = []
    with chat_server(reply) as server:
        answers = ask(config_of(server, concurrency=4), lazily(), SECTION, on_answer=lambda n, a: came.append((n, a)))
    assert [answer.text for answer in answers] == [f"answer to question {n}" for n in range(40)]
    assert 2 <= server.most_at_once <= 4
    assert max(ahead) <= 4
    assert sorted(came, key=lambda pair: pair[0]) == list(enumerate(answers))
    assert answers[0].model == MODEL
    assert answers[0].usage == Usage(100, 10)


def test_a_question_is_asked_greedily_with_its_images():
    pixels = np.random.default_rng(0).integers(0, 255, (40, 80, 3), dtype=np.uint8)
    jpeg = jpeg_of(Image.fromarray(pixels), longest_px=32)
    with chat_server(echo) as server:
        ask(config_of(server, seed=7), [Request("Describe.", (jpeg,), max_tokens=9)], SECTION)
    body = server.asked[0].body
    assert (body["temperature"], body["seed"], body["max_tokens"], body["model"]) == (0, 7, 9, MODEL)
    assert "logprobs" not in body
    assert server.asked[0].images == [jpeg]
    assert Image.open(io.BytesIO(jpeg)).size == (32, 16)


def test_the_file_that_is_sent_is_the_same_each_time_and_holds_pixels_only():
    image = Image.new("RGB", (20, 30), "teal")
    exif = Image.Exif()
    exif[0x010E] = "a name"
    tagged = io.BytesIO()
    image.save(tagged, "JPEG", exif=exif)
    opened = Image.open(tagged)
    sent = jpeg_of(opened, 512)
    assert sent == jpeg_of(Image.open(tagged), 512)
    assert b"a name" in tagged.getvalue()
    assert b"a name" not in sent
    assert Image.open(io.BytesIO(sent)).size == (20, 30)


@pytest.mark.parametrize(
    "fault",
    [
        error(500, "out of memory"),
        replace(completion("half"), fault="truncated"),
        Reply(fault="dropped"),
        Reply(b'{"choices": [{"mess'),
        Reply(b"<html>gateway</html>", 504),
        Reply(b'{"object": "list"}'),
        replace(completion("late"), pause_s=0.4),
        error(429, "slow down", Retry_After="0"),
        error(429, "slow down"),
        error(503, "loading"),
    ],
    ids=["500", "truncated", "dropped", "invalid-json", "504", "no-completion", "slow", "429-after", "429", "503"],
)
def test_a_passing_fault_is_retried(fault):
    with chat_server(once(fault, echo)) as server:
        answers = ask(config_of(server, timeout_s=0.2 if fault.pause_s else 60), requests(5), SECTION)
    assert [answer.text for answer in answers] == [f"answer to question {n}" for n in range(5)]
    assert len(server.asked) == 10


@pytest.mark.parametrize("as_date", [False, True])
def test_all_requests_wait_as_long_as_the_server_asks(as_date):
    times = []

    def reply(asked):
        times.append(time.monotonic())
        if len(times) > 1:
            return echo(asked)
        # A date has whole seconds.
        return error(429, "slow down", Retry_After=formatdate(time.time() + 2, usegmt=True) if as_date else "1")

    with chat_server(reply) as server:
        ask(config_of(server, concurrency=1), requests(3), SECTION)
    assert times[1] - times[0] >= 0.9


def test_a_server_that_asks_for_more_patience_than_there_is_ends_it_at_once():
    with (
        chat_server(lambda asked: error(429, "slow down", Retry_After="3600")) as server,
        pytest.raises(UserError, match=r"caption\.endpoint\.url: .* does not answer \(HTTP 429: slow down\)"),
    ):
        ask(config_of(server, patience_s=60), requests(3), SECTION)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (error(401, "Incorrect API key"), r"caption\.endpoint\.api_key_env: .* \(HTTP 401: Incorrect API key\)"),
        (error(404, "no such model"), r"caption\.endpoint\.model or .* answers 404: no such model"),
        (error(402, "pay"), "no credit left"),
        (error(429, "quota", code="insufficient_quota"), "no credit left"),
        (
            Reply(b"", 307, {"Location": "http://127.0.0.1:1/elsewhere"}),
            r"redirects to http://127\.0\.0\.1:1/elsewhere",
        ),
    ],
)
def test_a_permanent_fault_is_told_at_once(fault, message):
    with chat_server(lambda asked: fault) as server, pytest.raises(UserError, match=message):
        ask(config_of(server, concurrency=1), requests(3), SECTION)
    assert len(server.asked) == 1


def test_kinds_of_answers_are_told_apart():
    replies = {
        "question 0": completion("  A red ball. \n"),
        "question 1": completion(""),
        "question 2": completion(None),
        "question 3": completion("", refusal="no"),
        "question 4": completion("", finish="content_filter"),
        "question 5": completion("I\u2019m sorry, but I can\u2019t describe people."),
        "question 6": completion("and so on " * 1300, finish="length", usage=(100, 4000)),
        "question 7": completion("and so on " * 1300, usage=None),
        "question 8": error(400, "image too large"),
        "question 9": completion([{"type": "text", "text": "in parts"}]),
        "question 10": completion("half an emoji \ud83d"),
    }
    with chat_server(lambda asked: replies[asked.prompt]) as server:
        answers = ask(config_of(server), requests(11), SECTION)
    kinds = [answer.kind for answer in answers]
    assert kinds == ["text", *["empty"] * 2, *["refused"] * 3, *["too_long"] * 2, "rejected", "text", "text"]
    assert answers[0].text == "A red ball."
    assert answers[9].text == "in parts"
    assert answers[10].text == "half an emoji ?"
    assert answers[8].detail == "HTTP 400: image too large"
    assert [answer_of_record(json.loads(json.dumps(answer.as_record()))) for answer in answers] == answers


def test_a_models_thoughts_are_none_of_its_answer():
    logprobs = {"<think>": -0.01, "No": -6.0, "Yes": -9.0}
    replies = {
        "question 0": completion("<think>\nIs it red? No, wait.\n</think>\n\nYes", logprobs=logprobs),
        "question 1": completion("the mark was the prompt's </think> Yes", logprobs=logprobs),
        "question 2": completion("Yes", reasoning_content="No, wait.", logprobs=logprobs),
        "question 3": completion("Yes", reasoning="No, wait.", logprobs=logprobs),
        "question 4": completion("<think> and so", finish="length"),
        "question 5": completion(None, finish="length", reasoning_content="and so"),
    }
    with chat_server(lambda asked: replies[asked.prompt]) as server:
        answers = ask(config_of(server), requests(6), SECTION)
    assert [(answer.kind, answer.text) for answer in answers] == [("text", "Yes")] * 4 + [("too_long", "")] * 2
    assert [answer.probability_of_yes() for answer in answers] == [1.0] * 4 + [None] * 2


def test_a_server_that_was_given_up_is_not_waited_for_again_until_it_answers():
    def reply(asked):
        return echo(asked) if is_back.is_set() else error(503, "loading")

    is_back = threading.Event()
    with chat_server(reply) as server:
        config = config_of(server, patience_s=0.3, retries=3)
        for least_s in (0.15, 0.0):  # as in the next batch of a build
            started, asked_before = time.monotonic(), len(server.asked)
            with pytest.raises(UserError, match=r"does not answer .HTTP 503"):
                ask(config, requests(1), SECTION)
            assert time.monotonic() - started >= least_s
            num_asked = len(server.asked) - asked_before
        assert num_asked == 1
        is_back.set()
        assert [answer.kind for answer in ask(config, requests(3), SECTION)] == ["text"] * 3
        is_back.clear()
        asked_before = len(server.asked)
        with pytest.raises(UserError, match="does not answer"):
            ask(config, requests(1), SECTION)
        assert len(server.asked) > asked_before + 1


def test_a_server_that_breaks_down_in_the_middle_ends_it_and_its_failures_are_asked_again(tmp_path):
    broken = threading.Event()

    def reply(asked):
        if asked.prompt == "question 30":
            broken.set()
        return error(500, "engine dead") if broken.is_set() else echo(asked)

    path = tmp_path / "00000.answers.jsonl"
    with chat_server(reply) as server, AnswerLog(path, "key") as log:
        config = config_of(server, retries=0, concurrency=4)
        with pytest.raises(UserError, match=r"does not answer .HTTP 500: engine dead"):
            ask(config, requests(1000), SECTION, None, lambda number, answer: log.add(str(number), "q", answer))
    assert len(server.asked) < 100
    with AnswerLog(path, "key") as log:
        assert ("29", "q") in log
        assert ("30", "q") not in log


@pytest.mark.parametrize(("status", "kind"), [(500, "failed"), (400, "rejected")])
def test_requests_that_fail_for_themselves_do_not_stop_a_run_that_has_nothing_else_left(status, kind):
    def reply(asked):
        is_poison = asked.prompt.startswith("question")
        return error(status, "crash") if is_poison else echo(asked)

    image = jpeg_of(Image.new("RGB", (8, 8)), 8)
    with chat_server(reply) as server:
        questions = [Request(f"question {number}", (image,)) for number in range(50)]
        answers = ask(config_of(server, retries=0), questions, SECTION)
        assert {answer.kind for answer in answers} == {kind}
        assert all(len(asked.images) == 1 for asked in server.asked)


def test_one_poisonous_request_does_not_stop_the_others_but_a_broken_server_does():
    def reply(asked):
        return error(500, "crash") if asked.prompt == "question 3" else echo(asked)

    with chat_server(reply) as server:
        answers = ask(config_of(server, retries=2, concurrency=1), requests(6), SECTION)
        assert [answer.kind for answer in answers] == ["text"] * 3 + ["failed"] + ["text"] * 2
        assert len(server.asked) == 5 + 3
    with chat_server(lambda asked: error(500, "crash")) as server, pytest.raises(UserError, match="HTTP 500: crash"):
        ask(config_of(server, retries=2), requests(6), SECTION)


def test_a_server_that_rejects_everything_is_no_matter_of_single_requests():
    with (
        chat_server(lambda asked: error(400, "no images here")) as server,
        pytest.raises(UserError, match="rejects every request: HTTP 400: no images here"),
    ):
        ask(config_of(server), requests(50), SECTION)


def test_probability_of_yes():
    logprobs = {"Yes": -0.5, " yes": -2.0, "No": -1.5, "Maybe": -3.0}
    with chat_server(lambda asked: completion("Yes", logprobs=logprobs)) as server:
        (answer,) = ask(config_of(server), [Request("Is it red?", top_logprobs=5)], SECTION)
    yes, no = np.exp(-0.5) + np.exp(-2.0), np.exp(-1.5)
    assert answer.probability_of("yes") == pytest.approx(yes)
    assert answer.probability_of_yes() == pytest.approx(yes / (yes + no))
    assert server.asked[0].body["top_logprobs"] == 5
    texts = {"Yes, it is.": 1.0, "no": 0.0, "Noble gases": None, "A ball.": None}
    assert {text: Answer("text", text).probability_of_yes() for text in texts} == texts


def test_fields_that_a_server_does_not_accept_are_left_out_or_renamed():
    def reply(asked):
        if "logprobs" in asked.body:
            return error(422, "Unsupported fields in the request: {'logprobs', 'top_logprobs'}")
        if "max_tokens" in asked.body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if "temperature" in asked.body:
            return error(400, "Unsupported value: 'temperature' does not support 0 with this model.")
        if "seed" in asked.body:  # as pydantic writes it
            body = {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "input": 0}]}
            return Reply(json.dumps(body).encode(), 422)
        return completion("yes")

    with chat_server(reply, models=["another"]) as server:
        assert check_endpoint(config_of(server), SECTION).startswith(MODEL)
        server.asked.clear()
        answers = ask(config_of(server, concurrency=1), [Request("Is it red?", top_logprobs=5)] * 3, SECTION)
    assert [answer.probability_of_yes() for answer in answers] == [1.0] * 3
    assert len(server.asked) == 7
    assert server.asked[-1].body["max_completion_tokens"] == 128


@pytest.mark.parametrize(
    "complaint",
    [
        "Requested sample logprobs of 20, which is greater than max allowed: 5",
        "top_logprobs must be less than or equal to 5",
    ],
)
def test_a_server_that_tells_fewer_probabilities_is_asked_for_as_many(complaint):
    def reply(asked):
        if asked.body["top_logprobs"] > 5:
            return error(400, complaint)
        return completion("Yes", logprobs={"Yes": -0.5, "No": -1.5})

    with chat_server(reply) as server:
        answers = ask(config_of(server, concurrency=2), [Request("Is it red?", top_logprobs=20)] * 4, SECTION)
    assert [answer.probability_of_yes() for answer in answers] == [pytest.approx(1 / (1 + np.exp(-1.0)))] * 4
    assert server.asked[-1].body["top_logprobs"] == 5


def test_requests_in_flight_together_adapt_to_the_same_complaint():
    together = threading.Barrier(24)

    def reply(asked):
        if "max_tokens" in asked.body:
            together.wait(10)
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return echo(asked)

    with chat_server(reply) as server:
        answers = ask(config_of(server, concurrency=24), requests(24), SECTION)
    assert [answer.kind for answer in answers] == ["text"] * 24


def test_what_a_process_spends_on_many_shards_is_one_file(tmp_path):
    with chat_server(echo) as server:
        config = config_of(server, max_total_tokens=10**6)
        for _ in range(3):
            ask(config, requests(2), SECTION, Budget(config, tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
    assert usage_in(tmp_path).total_tokens == 3 * 2 * 110


def test_the_budget_stops_clearly_and_goes_on_when_raised(tmp_path):
    answered = []
    with chat_server(echo) as server:
        settings = {"concurrency": 2, "prompt_price": 1000.0, "completion_price": 10_000.0}
        little = config_of(server, max_cost=1.0, **settings)
        with pytest.raises(UserError, match=r"budget is spent: .*max_cost is 1 dollars.* raise the limit"):
            ask(little, requests(20), SECTION, Budget(little, tmp_path), lambda n, a: answered.append(n))
        # An answer costs 0.20; those in flight are kept.
        assert 5 <= len(answered) <= 6
        assert len(answered) == len(server.asked)
        assert usage_in(tmp_path) == Usage(100 * len(answered), 10 * len(answered))
        with pytest.raises(UserError, match="budget is spent"):  # another process sees what this one spent
            ask(little, requests(20), SECTION, Budget(little, tmp_path))
        assert len(server.asked) == len(answered)
        more = config_of(server, max_cost=2.0, max_total_tokens=10**6, **settings)
        assert len(ask(more, requests(2), SECTION, Budget(more, tmp_path))) == 2
    assert usage_in(tmp_path).total_tokens == 110 * (len(answered) + 2)


def test_a_budget_needs_a_server_that_counts():
    with (
        chat_server(lambda asked: completion("yes", usage=None)) as server,
        pytest.raises(UserError, match="does not report its usage"),
    ):
        ask(config_of(server, max_total_tokens=100), requests(1), SECTION)


def test_the_key_is_sent_and_told_nobody(monkeypatch):
    monkeypatch.setattr(redaction, "_known", set())
    monkeypatch.setenv("CAPTIONER", "opensesame")
    with chat_server(lambda asked: error(401, f"{asked.headers['Authorization']} is wrong")) as server:
        config = config_of(server, api_key_env="CAPTIONER")
        with pytest.raises(UserError) as raised:
            ask(config, requests(1), SECTION)
    assert server.asked[0].headers["Authorization"] == "Bearer opensesame"
    assert "opensesame" not in str(raised.value) + repr(config)
    monkeypatch.delenv("CAPTIONER")
    with pytest.raises(UserError, match="variable CAPTIONER is not set"):
        ask(config, requests(1), SECTION)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, "not the address of a server"),
        ({"url": "http://me:password1@host/v1"}, "name the key's variable"),
        ({"api_key_env": "sk-not-a-name-but-a-key"}, "not the name of an environment variable"),
        ({"max_cost": 3}, "max_cost needs prompt_price"),
    ],
)
def test_wrong_settings_are_refused_without_showing_a_key(settings, message, monkeypatch):
    monkeypatch.setattr(redaction, "_known", set())
    content = {"url": "http://127.0.0.1:8000/v1", "model": MODEL} | settings
    with pytest.raises(UserError, match=message) as raised:
        parse_settings(EndpointConfig, content, "recipe.yaml")
    assert "sk-not" not in str(raised.value)
    assert "password1" not in str(raised.value)


def test_the_check_finds_the_model_or_says_what_is_wrong():
    with chat_server(echo, models=("other", MODEL)) as server:
        assert check_endpoint(config_of(server), SECTION) == f"{MODEL} at {server.url}"
        assert not server.asked
    with chat_server(echo, models=()) as server:  # it has more than it lists
        assert check_endpoint(config_of(server), SECTION) == f"{MODEL} at {server.url}"
    with (
        chat_server(lambda asked: error(404, "no such model"), models=("tiny-vlm-2",)) as server,
        pytest.raises(UserError, match=r"does not have 'tiny-vlm'\. Did you mean 'tiny-vlm-2'\?"),
    ):
        check_endpoint(config_of(server), SECTION)
    gone = EndpointConfig(url="http://127.0.0.1:1/v1", model=MODEL)
    with pytest.raises(UserError, match=r"caption\.endpoint\.url: .* does not answer \(no connection"):
        check_endpoint(gone, SECTION)


def test_it_can_be_called_where_an_event_loop_runs_and_from_a_generator_that_fails():
    async def inside(server):
        return ask(config_of(server), requests(3), SECTION)

    def failing():
        yield from requests(2)
        raise UserError("shard 00003.tar is damaged")

    with chat_server(echo) as server:
        assert len(asyncio.run(inside(server))) == 3
        with pytest.raises(UserError, match="is damaged"):
            ask(config_of(server, concurrency=2), failing(), SECTION)


def test_an_interrupted_shard_forgets_removed_images(tmp_path):
    path, answer = tmp_path / "00000.answers.jsonl", Answer("text", "a scene")
    with AnswerLog(path, "made of") as log:
        for uid in ("kept", "removed"):
            log.add(uid, "short", answer)
    forget_images(path, lambda uid: uid == "removed")
    assert b"removed" not in path.read_bytes()
    with AnswerLog(path, "made of") as log:
        assert log["kept", "short"] == answer
        assert ("removed", "short") not in log
