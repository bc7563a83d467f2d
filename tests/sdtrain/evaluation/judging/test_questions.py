import json

import pytest

from sdtrain.errors import UserError
from sdtrain.evaluation.judging.questions import questions_digest, read_questions

PUBLISHED = {
    "prompt": "four white bicycles in front of three plastic cows",
    "atom_count": 7,
    "vqa_list": [
        ["How many bicycles are in the image?", "four"],
        ["Are the bicycles white?", "Yes"],
        ["Are there any bicycles in the image?", "Yes"],
        ["Are the bicycles in front of the cows?", "Yes"],
        ["How many cows are in the image?", "three"],
        ["Are the cows plastic?", "Yes"],
        ["Are there any cows in the image?", "Yes"],
    ],
    "skills": ["count", "attribute", "object", "position", "count", "attribute", "object"],
}
"""The example in the README of facebookresearch/GenEval2."""
OTHER = {"prompt": "a {red} fox", "vqa_list": [["Is the {fox} red?", "Yes"]], "skills": ["attribute"]}


def write(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def test_the_published_form_is_read_and_asked_as_geneval_2_asks_it(tmp_path):
    first, second = read_questions(write(tmp_path / "geneval2_data.jsonl", PUBLISHED, OTHER))
    assert first.skills == PUBLISHED["skills"]
    assert [question.text for question in first.questions[:2]] == [
        "How many bicycles are in the image? Answer in one word.",
        "Are the bicycles white? Answer in one word.",
    ]
    assert [question.answers for question in first.questions[:2]] == [("four", "4"), ("yes",)]
    assert [question.text for question in second.questions] == [
        "Is the {fox} red? Answer in one word.",
        'Does this image show "a {red} fox"? Answer the question with Yes or No.',
    ]


def test_a_byte_order_mark_windows_lines_and_other_line_ends_in_a_text_are_read(tmp_path):
    records = [PUBLISHED, OTHER | {"prompt": "a red fox\u2028at dawn\u0085"}]
    lines = "".join(f"{json.dumps(record, ensure_ascii=False)}\r\n" for record in records)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert [prompt.prompt for prompt in read_questions(tmp_path / "a.jsonl")] == [each["prompt"] for each in records]


def test_a_json_list_is_the_same_and_the_digest_tells_others_apart(tmp_path):
    lines = read_questions(write(tmp_path / "a.jsonl", PUBLISHED, OTHER))
    (tmp_path / "b.json").write_text(json.dumps([PUBLISHED, OTHER], indent=1))
    assert read_questions(tmp_path / "b.json") == lines
    changed = read_questions(write(tmp_path / "c.jsonl", PUBLISHED, OTHER | {"skills": ["object"]}))
    assert questions_digest(changed) != questions_digest(lines)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (OTHER | {"skills": []}, "line 2: .*1 questions have 0 skills"),
        (OTHER | {"vqa_list": [["Is it red?"]]}, r"line 2, vqa_list\.0\.1: Field required"),
        ({"tag": "two_object"}, "line 2, prompt: Field required.* as geneval2_data.jsonl of GenEval 2 has them"),
    ],
)
def test_another_form_is_refused_by_line(record, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_questions(write(tmp_path / "x.jsonl", PUBLISHED, record))


def test_a_file_that_is_no_json_or_too_short_is_a_sentence(tmp_path):
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(OTHER)}\nnothing\n")
    with pytest.raises(UserError, match=r"x\.jsonl, line 2 is not JSON"):
        read_questions(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="holds 1 prompts"):
        read_questions(write(tmp_path / "y.jsonl", OTHER))
    with pytest.raises(UserError, match="cannot be read as questions"):
        read_questions(tmp_path / "none.jsonl")
