import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdtrain.errors import UserError
from sdtrain.evaluation.prompts import choose_prompts
from sdtrain.formats.frozen import load_tokenizer
from sdtrain.models.text import truncated_part
from sdtrain.sampling.prompts import parse_seeds, read_prompts

PROMPTS = ["a red circle, on grass", "ein grüner Kreis"]
WILD = Path(__file__).parents[4] / "shared" / "data" / "wild"


def write(tmp_path, content, name="prompts.txt"):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_come_one_a_line_whatever_the_encoding(tmp_path, ending, encoding):
    content = ending.join([PROMPTS[0], "", f"  {PROMPTS[1]} ", ""]).encode(encoding)
    assert read_prompts(write(tmp_path, content)) == PROMPTS
    assert read_prompts(write(tmp_path, gzip.compress(content), "prompts.txt.gz")) == PROMPTS


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\x1e"])
def test_no_other_character_ends_a_prompt(tmp_path, character):
    prompt = f"a red{character}circle"
    assert read_prompts(write(tmp_path, f"{prompt}\na\n".encode())) == [prompt, "a"]
    rows = f'prompt\n"{prompt}"\na\n'.encode()
    assert read_prompts(write(tmp_path, rows, "prompts.csv")) == [prompt, "a"]
    lines = f'{{"prompt": "{prompt}"}}\n'.encode() if character > "\x1f" else b'{"prompt": "a red circle"}\n'
    assert len(read_prompts(write(tmp_path, lines, "prompts.jsonl"))) == 1


TABLES = {
    "prompts.csv": 'id,prompt\r\n1,"a red circle, on grass"\r\n2,\r\n3,ein grüner Kreis\r\n',
    "excel.csv": "\ufeffid;prompt\n1;a red circle, on grass\n3;ein grüner Kreis\n",
    "prompts.TSV": "prompt\tid\na red circle, on grass\t1\nein grüner Kreis\t3\n",
    "prompts.jsonl": '{"prompt": "a red circle, on grass"}\n\n{"prompt": null}\n{"prompt": "ein gr\\u00fcner Kreis"}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_a_tables_column_is_read(tmp_path, name):
    content = TABLES[name].encode()
    assert read_prompts(write(tmp_path, content, name)) == PROMPTS
    assert read_prompts(write(tmp_path, gzip.compress(content), f"{name}.gz")) == PROMPTS
    named = content.replace(b"prompt", b"TEXT")
    assert read_prompts(write(tmp_path, named, name), "TEXT") == PROMPTS
    with pytest.raises(UserError, match=r"has no column 'prompt' but: .*TEXT.* --prompt-column"):
        read_prompts(tmp_path / name)


def test_a_parquet_files_column_is_read(tmp_path):
    pq.write_table(pa.table({"id": [1, 2, 3], "prompt": [PROMPTS[0], None, PROMPTS[1]]}), tmp_path / "prompts.parquet")
    assert read_prompts(tmp_path / "prompts.parquet") == PROMPTS
    with pytest.raises(UserError, match="no column 'text' but: id, prompt"):
        read_prompts(tmp_path / "prompts.parquet", "text")


def test_quoted_line_ends_stay_in_a_tables_prompt(tmp_path):
    path = write(tmp_path, b'prompt,id\n"a red\ncircle",1\n', "prompts.csv")
    assert read_prompts(path) == ["a red\ncircle"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.txt", b"\n \n"),
        ("prompts.txt", b"\xff bad"),
        ("prompts.txt", None),
        ("prompts.csv", b"prompt\n\n"),
        ("prompts.csv", b""),
        ("prompts.jsonl", b"{bad\n"),
        ("prompts.jsonl", b"[1]\n"),
        ("prompts.parquet", b"PAR1 no"),
        ("prompts.txt.gz", b"no gzip"),
    ],
)
def test_a_bad_file_of_prompts_is_a_sentence(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} (cannot be read|holds no prompt|has no column|has lines)"):
        read_prompts(path)


def test_an_evaluation_reads_the_same_tables(tmp_path):
    chosen = choose_prompts(write(tmp_path, TABLES["excel.csv"].encode(), "prompts.csv"), 2, seed=0)
    assert sorted(chosen.texts) == PROMPTS


@pytest.mark.skipif(not WILD.is_dir(), reason="the files are handed out with the project, not committed")
def test_files_as_they_occur_outside_are_read():
    assert read_prompts(WILD / "prompts-bom.txt") == ["a red circle", "a blue star"]
    assert read_prompts(WILD / "prompts.csv") == ["a red circle, on grass", "a blue star"]


def test_seeds_are_ranges_and_numbers():
    assert parse_seeds("0-3") == [0, 1, 2, 3]
    assert parse_seeds("3, 7,10-12") == [3, 7, 10, 11, 12]


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1,,2", "0-9999999999", "1-2-3", "1-3,2"])
def test_other_seeds_are_a_sentence(text):
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(text)


def test_what_is_cut_off_a_prompt_is_known():
    tokenizer = load_tokenizer("demo")
    words = [f"w{number}" for number in range(200)]
    part = truncated_part(tokenizer, " ".join(words))
    assert part
    kept = " ".join(words).removesuffix(part)
    assert truncated_part(tokenizer, kept) == ""
    whole = tokenizer(" ".join(words)).input_ids[: tokenizer.model_max_length - 1]
    assert tokenizer(kept).input_ids[:-1] == whole
    assert truncated_part(tokenizer, "a red circle") == ""
