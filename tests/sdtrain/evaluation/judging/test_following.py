"""A judge on loopback, whose probabilities follow from the pixels that it is sent: an image mixed up would be seen."""

import csv
import io
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sdtrain import cli
from sdtrain.endpoint.config import EndpointConfig
from sdtrain.endpoint.messages import Request, jpeg_of
from sdtrain.errors import UserError
from sdtrain.evaluation.judging.answer_log import AnswerLog, request_digest
from sdtrain.evaluation.judging.following import with_prompt_following
from sdtrain.evaluation.judging.scores import AXES
from sdtrain.evaluation.protocol import Protocol
from sdtrain.evaluation.results import read_results, table_of, table_of_skills
from sdtrain.evaluation.stages import read_images
from sdtrain.evaluation.sweep import plan
from sdtrain.evaluation.workers import run_sweep
from tests.chat_server import MODEL, chat_server, completion
from tests.sdtrain.evaluation.evaluation_fixtures import PROMPTS, write_images

QUESTIONS = [
    ("two red cubes", [("How many cubes are there?", "two", "count"), ("Are they red?", "Yes", "attribute")]),
    ("a dog runs", [("Is there a dog?", "Yes", "object"), ("Does it run?", "Yes", "verb")]),
    ("a cat", [("Is there a cat?", "Yes", "object")]),
]
NUM_ASKED = 2 * (3 + 3 + 2)
"""At each of two scales, with the question about the whole prompt."""


def seen(jpeg, question):
    """The judge's probability of the right answer: of one pixel, another for each question."""
    place = sum(question.encode()) % 40
    return 0.05 + 0.9 * Image.open(io.BytesIO(jpeg)).convert("RGB").getpixel((place, 2 * place % 60))[0] / 255


def reply(asked, **changed):
    chance = seen(asked.images[0], asked.prompt)
    right, wrong = ({"two": 0.75, "2": 0.25}, "five") if asked.prompt.startswith("How many") else ({" Yes": 1.0}, "No")
    logprobs = {word: math.log(share * chance) for word, share in right.items()} | {wrong: math.log(1 - chance)}
    return completion(next(iter(right)).strip(), finish="length", usage=(100, 1), logprobs=logprobs, **changed)


def write_questions(folder):
    records = [
        {
            "prompt": prompt,
            "atom_count": len(asked) + 1,
            "vqa_list": [[question, answer] for question, answer, _ in asked],
            "skills": [skill for _, _, skill in asked],
        }
        for prompt, asked in QUESTIONS
    ]
    path = folder / "geneval2_data.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDTRAIN_CACHE", str(folder / "cache"))
        yield Protocol(
            prompts=str(folder / "prompts.txt"),
            num_prompts=2,
            reference=str(write_images(folder / "real", 3)),
            scales=(1.0, 3.0),
            num_steps=2,
            dtype="fp32",
            part_size=2,
            network="demo",
            agreement="none",
        )


@pytest.fixture(scope="module")
def whole(protocol, run, tmp_path_factory):
    """An evaluation that has been run, and what the judge was asked."""
    folder = tmp_path_factory.mktemp("whole")
    with chat_server(reply) as server:
        sweep = planned(protocol, run, folder, write_questions(tmp_path_factory.mktemp("questions")), server)
        sweep = replace(sweep, axes=plan(protocol, [run], folder, "soft_tifa_gm", further=AXES).axes)
        results = run_sweep(sweep, say=quiet)
    return SimpleNamespace(folder=folder, sweep=sweep, results=results, url=server.url, asked=server.asked)


@pytest.fixture
def unanswered(whole, tmp_path):
    """A copy of its folder with all images and no answer."""
    copy = shutil.copytree(whole.folder, tmp_path / "out")
    shutil.rmtree(copy / "following" / "answers")
    return copy


@pytest.fixture
def questions(tmp_path):
    return write_questions(tmp_path)


def planned(protocol, run, folder, questions, server, **settings):
    judge = EndpointConfig(url=server.url, model=MODEL, concurrency=1, **settings)
    return with_prompt_following(plan(protocol, [run], folder), questions, judge)


def quiet(line):
    pass


def images_of(sweep, scale):
    folder = sweep.directory.root / "following" / "samples" / sweep.models[0].key / scale
    return [image for tar in sorted(folder.glob("*.tar")) for image in read_images(tar)[0]]


def test_each_number_is_that_of_the_judges_probabilities_for_the_very_images(whole):
    results = whole.results
    assert len(whole.asked) == NUM_ASKED
    for row, scale in zip(results.rows, ("guidance-1", "guidance-3"), strict=True):
        chances, of_whole = [], []
        for image, (prompt, asked) in zip(images_of(whole.sweep, scale), QUESTIONS, strict=True):
            jpeg = jpeg_of(image, 64)
            chances.append([seen(jpeg, f"{question} Answer in one word.") for question, _, _ in asked])
            of_whole.append(seen(jpeg, f'Does this image show "{prompt}"? Answer the question with Yes or No.'))
        assert row["soft_tifa_am"] == pytest.approx(np.mean([np.mean(each) for each in chances]))
        assert row["soft_tifa_gm"] == pytest.approx(np.mean([math.prod(each) ** (1 / len(each)) for each in chances]))
        assert row["vqa_score"] == pytest.approx(np.mean(of_whole))
        assert row["soft_tifa_gm_ci95"] > 0
        objects = [row for row in results.skills if row["group"] == "object"]
        at_scale = next(each for each in objects if each["guidance_scale"] == row["guidance_scale"])
        assert at_scale["value"] == pytest.approx(np.mean([chances[1][0], chances[2][0]]))
    assert results.rows[0]["soft_tifa_am"] != results.rows[1]["soft_tifa_am"]

    said = results.protocol
    assert said["judge"] == {"model": MODEL, "seed": 0, "reported": {MODEL: NUM_ASKED}}
    assert said["judge_prompts"][0] == "{question} Answer in one word."
    assert (said["questions_source"], len(said["questions_sha256"])) == (
        "geneval2_data.jsonl: 3 prompts, 8 questions",
        64,
    )
    assert whole.url not in (whole.folder / "results.json").read_text()
    assert "±" in table_of(results)[0]["soft_tifa_gm"]
    assert Image.open(whole.folder / "curve.png").width > 500
    assert list(table_of_skills(results)[0]) == ["group", "num", "number", "1", "3"]
    assert read_results(whole.folder / "results.json") == results
    with (whole.folder / "skills.csv").open(newline="") as file:
        assert {row["group"] for row in csv.DictReader(file)} >= {"object", "count", "verb", "3 atoms"}


def test_answers_are_asked_once_whatever_stops_the_evaluation(protocol, run, whole, unanswered, questions):
    out = unanswered
    with chat_server(reply) as server:
        for limit in (303, 1111):
            with pytest.raises(UserError, match=r"The budget is spent: .*All answers are kept"):
                run_sweep(planned(protocol, run, out, questions, server, max_total_tokens=limit), say=quiet)
        run_sweep(planned(protocol, run, out, questions, server), say=quiet)
        assert len(server.asked) == len({(asked.prompt, asked.images[0]) for asked in server.asked}) == NUM_ASKED
        assert (out / "results.json").read_bytes() == (whole.folder / "results.json").read_bytes()
        run_sweep(planned(protocol, run, out, questions, server), say=quiet)
        assert len(server.asked) == NUM_ASKED

        lines = questions.read_text().splitlines()
        more = json.loads(lines[2])
        more |= {"vqa_list": [*more["vqa_list"], ["Is it a big cat?", "Yes"]], "skills": ["object", "attribute"]}
        questions.write_text("\n".join([*lines[:2], json.dumps(more)]))
        run_sweep(planned(protocol, run, out, questions, server), say=quiet)
        assert [asked.prompt for asked in server.asked[NUM_ASKED:]] == ["Is it a big cat? Answer in one word."] * 2


def test_what_the_judge_cannot_say_is_told(protocol, run, unanswered, questions):
    def hard(asked):
        if "cubes" in asked.prompt:
            return completion("I'm sorry, I can't help with that.")
        return completion("Yes." if "dog" in asked.prompt else "no")

    with chat_server(hard) as server:
        results = run_sweep(planned(protocol, run, unanswered, questions, server), say=quiet)
    (row, _) = results.rows
    assert row["vqa_score"] == pytest.approx(1 / 3)
    assert row["soft_tifa_am"] == pytest.approx(1 / 6)
    notes = " ".join(results.notes)
    assert "16 of 16 questions were answered without probabilities of tokens" in notes
    assert "4 of 16 questions were declined by the judge" in notes


def test_a_judge_that_is_not_there_is_told_before_anything_is_drawn(protocol, run, tmp_path, questions):
    with chat_server(reply) as server:
        sweep = planned(protocol, run, tmp_path / "out", questions, server)
        wrong = replace(sweep.following, judge=EndpointConfig(url=server.url, model="other", patience_s=0))
        server.reply = lambda asked: completion("", model="x") and replace(completion(""), status=404)
        with pytest.raises(UserError, match=r"judge\.model: .* does not have 'other'"):
            run_sweep(replace(sweep, following=wrong), say=quiet)
    assert not (tmp_path / "out" / "samples").exists()


def test_a_line_that_was_cut_off_is_forgotten(tmp_path):
    from sdtrain.endpoint.answers import Answer

    path = tmp_path / "a" / "0.jsonl"
    digest = request_digest({"model": "m"}, Request("q", (b"image",)))
    assert digest != request_digest({"model": "m"}, Request("q", (b"other",)))
    with AnswerLog(path) as log:
        log.add(digest, Answer("text", "yes", first_token={"yes": 0.5}))
        log.add("lost", Answer("failed"))
    path.write_bytes(path.read_bytes() + b'{"request": "half')
    with AnswerLog(path) as log:
        assert digest in log
        assert "lost" not in log
        assert log[digest].first_token == {"yes": 0.5}
        log.add("next", Answer("text", "no"))
    with AnswerLog(path) as log:
        assert ("next" in log, digest in log) == (True, True)


def test_questions_and_judge_go_together(protocol, run, tmp_path, monkeypatch, capsys):
    command = ["sdtrain", "evaluate", str(run), "--prompts", protocol.prompts, "--reference", protocol.reference]
    own = ["--num", "2", "--network", "demo", "--agreement", "none", "--steps", "2", "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*command, *own, "--questions", "geneval2_data.jsonl"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--questions and --judge go together" in capsys.readouterr().err
