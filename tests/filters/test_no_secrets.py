"""A secret in any setting that can hold one comes out nowhere: messages, logs, records, reports, metrics, names."""

from __future__ import annotations

import importlib
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import BaseModel

from filters.inspect.prometheus import StatusCollector
from filters.recipe import load_recipe
from filters.recipe_record import read_recipe, record_recipe
from filters.select.metadata_files import find_metadata
from filters.select.side_inputs import identify_side_inputs
from sdtrain import cli, redaction, train
from sdtrain.config import TrainConfig, changes
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries
from sdtrain.errors import UserError
from sdtrain.settings import Settings, dump_settings, parse_settings
from tests.filters.removal_fixtures import NUM_ROWS, caption_of, files_with, make_recipe, url_of, write_metadata
from tests.filters.store_fixtures import PASSWORD, PLANTED, QUERY, SPELLINGS, Store, needs_httpfs, serving

# All settings that are text. A new one fails the test below until it is known whether it can hold a URL.
MODULES = (
    "filters.recipe",
    "filters.select_config",
    "filters.caption_config",
    "sdtrain.config",
    "sdtrain.endpoint.config",
    "sdtrain.evaluation.protocol",
)
LOCATIONS = {
    "CaptionModelConfig": {"name"},
    "DataConfig": {"root"},
    "DownloadConfig": {"contact", "ca_file"},
    "EncodeConfig": {"vae", "text_encoder"},
    "JoinConfig": {"files"},
    "ListConfig": {"files"},
    "Protocol": {
        "prompts", "reference", "tokenizer", "network_weights", "dinov2_weights", "clip_weights", "preference"
    },
    "ScoreConfig": {
        "clip_weights", "aesthetic_weights", "aesthetic_v1_weights", "watermark_weights", "safety_weights",
        "sscd_weights",
    },
    "SelectConfig": {"metadata"},
    "SourceConfig": {"root"},
    "TrackingConfig": {"wandb_project"},
    "TrainConfig": {"init_from", "vae", "text_encoder"},
}  # fmt: skip
WORDS = {
    "CardConfig": {"license", "region", "data_gpu"},
    "CaptionConfig": {"prompts"},
    "CaptionModelConfig": {"revision"},
    "Change": {"name", "before", "after"},  # no setting, but what became of one
    "JoinConfig": {"columns"},
    "DataConfig": {"captions"},
    "DecideConfig": {"rules"},
    "DownloadConfig": {"proxy"},  # one with a user or password is refused
    "EndpointConfig": {"url", "model", "api_key_env"},  # a url with a user, password or query is refused
    "PreviewConfig": {"prompts"},
    "Protocol": {"agreement", "clip_model", "networks"},
    "Recipe": {"name", "description", "expected_rows"},
    "ScoreConfig": {"clip_model", "clip_sha256", "aesthetic_sha256", "aesthetic_v1_sha256", "watermark_sha256"}
    | {"safety_sha256", "sscd_sha256"},
    "SelectConfig": {"carry", "columns", "rules"},
    "TrainConfig": {"name", "description"},
    "UNetConfig": {"down_block_types", "up_block_types"},
}
NEEDED: dict[str, dict[str, Any]] = {
    "CaptionModelConfig": {"name": "x"},
    "EndpointConfig": {"url": "http://127.0.0.1/v1", "model": "x"},
    "JoinConfig": {"files": "x"},
    "ListConfig": {"files": "x", "by": "url"},
    "Protocol": {"prompts": "x", "reference": "x"},
    "SourceConfig": {"root": "x"},
    "TrainConfig": {"name": "x", "steps": 1},
}


class SignedStore(Store):
    """Answers nobody without the signature."""

    signature = QUERY

    def do_GET(self):  # noqa: N802
        if self.path.partition("?")[2] == self.signature:
            super().do_GET()
        else:
            self.answer(403, f"The signature of {self.path} is wrong".encode())


@pytest.fixture
def records(monkeypatch):
    """What is logged, in a process that is as a command makes it."""
    monkeypatch.setattr(redaction, "_known", set())
    before = logging.getLogRecordFactory(), sys.excepthook
    redaction.hide_secrets_in_logs()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger().addHandler(handler)
    yield stream
    logging.getLogger().removeHandler(handler)
    logging.setLogRecordFactory(before[0])
    sys.excepthook = before[1]


def assert_hidden(text: str) -> None:
    assert [spelling for spelling in SPELLINGS if spelling in text] == []


def run(monkeypatch, capfd, *arguments: object) -> tuple[int, str]:
    """A command in this process: exit code, and all that it said."""
    monkeypatch.setattr(sys, "argv", ["sdtrain", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capfd.readouterr()
    return int(ended.value.code or 0), said.out + said.err


def models() -> dict[str, type[Settings]]:
    for module in MODULES:
        importlib.import_module(module)
    return {
        kind.__name__: kind
        for kind in kinds_of(Settings)
        if kind.__module__.startswith(MODULES) or "config" in kind.__module__
    }


def kinds_of(kind: type[Settings]) -> Iterator[type[Settings]]:
    """All kinds of settings, a kind before those that extend it."""
    for narrower in kind.__subclasses__():
        yield narrower
        yield from kinds_of(narrower)


def holds_text(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return False
    return annotation in (str, Any) or any(holds_text(inner) for inner in get_args(annotation) if inner is not None)


def test_of_every_setting_it_is_known_whether_it_can_hold_a_url():
    texts = {
        name: {field for field, info in kind.model_fields.items() if holds_text(info.annotation)}
        for name, kind in models().items()
    }
    known = {name: LOCATIONS.get(name, set()) | WORDS.get(name, set()) for name in {*LOCATIONS, *WORDS}}
    assert {name: fields for name, fields in texts.items() if fields} == known


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in LOCATIONS for field in sorted(LOCATIONS[name])])
def test_a_setting_is_recorded_and_refused_without_its_secret(records, name, field):
    kind = models()[name]
    content = NEEDED.get(name, {}) | {field: PLANTED}
    settings = parse_settings(kind, content, "mine.yaml")
    assert getattr(settings, field) == PLANTED
    assert_hidden(dump_settings(settings))
    assert "data.example/x.parquet?credential-not-recorded" in dump_settings(settings)
    for wrong in ({"unknown": PLANTED}, {field: [PLANTED]}, {field: {"x": PLANTED}}):
        with pytest.raises(UserError) as raised:
            parse_settings(kind, content | wrong, "mine.yaml")
        assert_hidden(str(raised.value))
        records.write("".join(redaction.without_secrets(str(raised.value.__cause__))))
    assert_hidden(records.getvalue())


def test_a_change_of_a_run_is_told_without_its_secret():
    old, new = (TrainConfig(name="x", steps=1, data={"root": root}) for root in ("/data", PLANTED))
    (change,) = changes(old, new)
    assert_hidden(f"{change} {change.model_dump_json()}")
    assert "data.root: /data -> " in str(change)


def test_a_file_that_is_no_yaml_is_not_quoted(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"select:\n  metadata: {PLANTED}: 1\n  x: [\n")
    with pytest.raises(UserError, match=r"mine.yaml is not valid YAML: line 2: mapping values") as raised:
        load_recipe(str(path))
    assert_hidden(str(raised.value))


def parquet(**columns: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


ROWS = {"URL": ["https://e.com/1.jpg"], "TEXT": ["a"]}
FILES = {
    "data/rows.parquet": parquet(**ROWS, WIDTH=[600], HEIGHT=[600]),
    "data/no-text.parquet": parquet(URL=["https://e.com/1.jpg"]),
    "data/twice.parquet": parquet(URL=["x"], url=["y"], TEXT=["z"]),
    "data/v1.parquet": parquet(**ROWS, aesthetic=[5.0], aesthetic_v1=[5.0]),
    "data/empty.parquet": parquet(URL=pa.array([], pa.string()), TEXT=pa.array([], pa.string())),
    "data/hashes.parquet": parquet(**ROWS, hash=[5]),
    "data/text.parquet": b"no Parquet at all, and long enough to have a footer",
    "data/latin.txt": "http://e.com/ü".encode("latin-1"),
    "data/hosts.txt": b"no host at all!\n",
    "data/good.txt": b"e.com\n",
}
# Else those that cannot be had here would be the mistake.
NO_NETWORKS: dict[str, Any] = {
    "score": {f"{name}_weights": None for name in ("clip", "aesthetic", "safety", "watermark")},
    "encode": {"vae": "demo", "resolution": 64},
}
MISTAKES = [
    ("metadata", {}, "none.parquet"),
    ("metadata", {}, "text.parquet"),
    ("metadata", {}, "no-text.parquet"),
    ("metadata", {}, "twice.parquet"),
    ("metadata", {}, "empty.parquet"),
    ("metadata", {}, "*.parquet"),
    ("metadata", {"rules": {"min_aesthetic": 5}}, "rows.parquet"),
    ("metadata", {"rules": {"min_side": 5000}}, "rows.parquet"),
    ("metadata", {"rules": {"min_side": 5}}, "no-text.parquet"),
    ("metadata", {"blocklists": [{"files": "{url}/data/good.txt?{query}", "by": "md5"}]}, "rows.parquet"),
    ("joins", {}, "none.parquet"),
    ("joins", {}, "no-text.parquet"),
    ("joins", {}, "rows.parquet"),
    ("joins", {}, "hashes.parquet"),
    ("blocklists", {"by": "host"}, "none.txt"),
    ("blocklists", {"by": "host"}, "latin.txt"),
    ("blocklists", {"by": "host"}, "hosts.txt"),
    ("blocklists", {"by": "uid"}, "rows.parquet"),
    ("allowlists", {"by": "sha256"}, "rows.parquet"),
    ("allowlists", {"by": "hash"}, "hashes.parquet"),
]


EXPIRED = QUERY.replace("3600", "1")
REFUSED = [("metadata", {}, "rows.parquet"), ("joins", {}, "v1.parquet"), ("blocklists", {"by": "host"}, "good.txt")]


@needs_httpfs
@pytest.mark.parametrize(
    ("setting", "more", "file", "query"), [(*row, QUERY) for row in MISTAKES] + [(*row, EXPIRED) for row in REFUSED]
)
def test_a_mistake_in_what_a_recipe_reads_shows_no_secret(
    monkeypatch, capfd, records, tmp_path, setting, more, file, query
):
    with serving(SignedStore) as store:
        store.files.update(FILES)
        planted = f"{store.url}/data/{file}?{query}"
        select: dict[str, Any] = {"metadata": f"{store.url}/data/rows.parquet?{QUERY}"}
        if setting == "metadata":
            select |= more | {"metadata": planted}
            for entry in select.get("blocklists", []):
                entry = dict(entry, files=entry["files"].format(url=store.url, query=query))
                select["blocklists"] = [entry]
        else:
            select[setting] = [{"files": planted} | more]
        recipe = tmp_path / "mine.yaml"
        recipe.write_text(yaml.safe_dump({"name": "mine", "select": select, **NO_NETWORKS}))
        code, said = run(monkeypatch, capfd, "build", recipe, "--output", tmp_path / "data")
    assert code == 2, said
    assert said.splitlines()[-1].startswith("error: ")
    assert_hidden(said + records.getvalue())
    assert files_with(tmp_path / "data", SPELLINGS) == []


@pytest.mark.slow
@needs_httpfs
def test_a_build_from_presigned_urls_leaves_no_secret_and_resumes_with_another_signature(
    monkeypatch, capfd, records, tmp_path, photo_site
):
    port = photo_site[1]
    path = write_metadata(tmp_path / "a.parquet", port, range(NUM_ROWS))
    entry = f"{url_of(1, port)}\n".encode()
    with serving(SignedStore) as store:
        scores = parquet(
            URL=[url_of(n, port) for n in range(NUM_ROWS)],
            TEXT=[caption_of(n) for n in range(NUM_ROWS)],
            pwatermark=[0.1] * NUM_ROWS,
            md5=[None] * NUM_ROWS,
        )
        md5s = parquet(md5=["0" * 32])
        files = {"a.parquet": path.read_bytes(), "b.txt": entry, "c.parquet": scores, "md5s.parquet": md5s}
        store.files.update({f"data/{name}": content for name, content in files.items()})
        path.unlink()
        recipe, dataset = tmp_path / "mine.yaml", DatasetDir(tmp_path / "data")

        def build(signature: str) -> str:
            store.signature = QUERY.replace("3600", signature)

            def place(name: str) -> str:
                return f"{store.url}/data/{name}?{store.signature}"

            select = {
                "metadata": place("a.parquet"),
                "samples_per_shard": 8,
                "joins": [{"files": place("c.parquet"), "by": "url_caption", "columns": ["pwatermark"]}],
                "blocklists": [{"files": place("b.txt"), "by": "url"}],
            }
            recipe.write_text(yaml.safe_dump(make_recipe(path, select=select).model_dump(mode="json")))
            code, said = run(monkeypatch, capfd, "build", recipe, "--output", dataset.root)
            assert code == 0, said
            return said

        said = build("3600")
        before = {stage: [e.finished_at for e in entries(dataset, stage)] for stage in ("select", "download", "encode")}
        said += build("7200")  # as on the next day
        assert before == {stage: [e.finished_at for e in entries(dataset, stage)] for stage in before}
        assert "redone" not in said
        assert len(before["encode"]) > 0
        for command in ("views", "report", "funnel", "status"):
            said += run(monkeypatch, capfd, command, dataset.root)[1]
        for sql in ("FROM metadata", "FROM remarks", "SELECT sql FROM duckdb_views()", "SELECT url FROM selection"):
            code, answer = run(monkeypatch, capfd, "query", dataset.root, sql)
            assert code == 0, answer
            said += answer
        assert url_of(2, port) in said
        metrics = repr(list(StatusCollector([str(dataset.root), f"{store.url}/x?{QUERY}"]).collect()))
        assert files_with(dataset.root, SPELLINGS) == []
        assert_hidden(said + metrics + records.getvalue())
        assert "joins" in dataset.recipe.read_text()

        # By the record alone nothing can be read, and the sentence says why; with a variable it goes on.
        code, answer = run(monkeypatch, capfd, "build", dataset.recipe, "--output", dataset.root)
        assert code == 2
        assert "a.parquet, which the recipe names as metadata" in answer
        assert "needs its query or password, which a record never holds" in answer
        content = yaml.safe_load(recipe.read_text())
        content["select"]["metadata"] = "${SIGNED_METADATA}"
        recipe.write_text(yaml.safe_dump(content))
        code, answer = run(monkeypatch, capfd, "build", recipe, "--output", dataset.root)
        assert (code, "no environment variable SIGNED_METADATA" in answer) == (2, True)
        monkeypatch.setenv("SIGNED_METADATA", f"{store.url}/data/a.parquet?{store.signature}")
        code, answer = run(monkeypatch, capfd, "build", recipe, "--output", dataset.root)
        assert code == 0, answer
        assert before == {stage: [e.finished_at for e in entries(dataset, stage)] for stage in before}
        assert read_recipe(dataset).select.metadata == "${SIGNED_METADATA}"
        assert files_with(dataset.root, SPELLINGS) == []
        assert_hidden(answer + run(monkeypatch, capfd, "query", dataset.root, "FROM metadata")[1] + records.getvalue())


@needs_httpfs
def test_what_identifies_a_file_is_the_same_whatever_its_signature():
    from filters.select_config import SelectConfig

    with serving() as store:
        store.files.update(FILES)

        def identities(query: str) -> list[object]:
            select = SelectConfig.model_validate(
                {
                    "metadata": f"{store.url}/data/rows.parquet{query}",
                    "joins": [{"files": f"{store.url}/data/v1.parquet{query}", "by": "url_caption"}],
                    "blocklists": [{"files": f"{store.url}/data/good.txt{query}", "by": "host"}],
                }
            )
            return [[file.identity for file in find_metadata(select.metadata)], identify_side_inputs(select)]

        assert identities("") == identities("?sig=1") == identities("?X-Amz-Signature=abc&x=y")


@needs_httpfs
def test_the_list_that_knows_not_all_files_is_noted_without_its_query(records, tmp_path):
    """A note goes into the manifest."""
    from tests.filters.select.metadata_fixtures import select, write

    write(tmp_path / "metadata" / "a.parquet", URL=["https://e.com/1.jpg"], TEXT=["a"], md5=["1" * 32])
    write(tmp_path / "metadata" / "b.parquet", URL=["https://e.com/2.jpg"], TEXT=["b"])
    with serving(SignedStore) as store:
        store.files["data/md5s.txt"] = b"0" * 32
        lists = [{"files": f"{store.url}/data/md5s.txt?{QUERY}", "by": "md5"}]
        _, report = select(tmp_path, blocklists=lists)
    assert any("knows none of their rows" in note for note in report.notes)
    assert_hidden(report.model_dump_json())


COMMANDS = [
    ("build", "demo", "--metadata", "x.parquet", "--output", PLANTED),
    ("build", "demo", "--metadata", PLANTED, "--output", "data"),
    ("build", "demo", "--metadata", "x", "--output", f"s3://me:{PASSWORD}@bucket/x?{QUERY}"),
    ("build", "demo", "--metadata", "x", "--output", "s3://bucket/x", "--work-dir", PLANTED),
    ("build", PLANTED),
    ("build", PLANTED + ".yaml"),
    ("recipe", PLANTED),
    ("funnel", PLANTED),
    ("query", PLANTED, "FROM metadata"),
    ("query", "none", f"FROM '{PLANTED}'"),
    ("views", PLANTED),
    ("report", PLANTED),
    ("status", PLANTED),
    ("card", PLANTED),
    ("decide", PLANTED),
    ("remove", PLANTED, "--list", "x"),
    ("remove", "none", "--list", PLANTED),
    ("search", PLANTED, "--text", "x"),
    ("sample", PLANTED),
    ("evaluate", PLANTED, "--prompts", PLANTED, "--reference", PLANTED),
    ("export", PLANTED, PLANTED),
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: " ".join(arguments)[:24])
def test_a_url_that_a_command_cannot_use_is_not_shown_and_names_no_folder(
    monkeypatch, capfd, records, tmp_path, arguments
):
    monkeypatch.chdir(tmp_path)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    code, said = run(monkeypatch, capfd, *arguments)
    assert code != 0
    assert_hidden(said + records.getvalue())
    assert [path for path in tmp_path.rglob("*") if "data.example" in str(path)] == []


@pytest.mark.parametrize("option", ["--config", "--data", "--output", "--init_from"])
def test_training_shows_no_secret_of_its_arguments(monkeypatch, capfd, records, tmp_path, option):
    monkeypatch.chdir(tmp_path)
    given = {"--config": "tiny", "--data": "none", "--output": "run"} | {option: PLANTED}
    monkeypatch.setattr(sys, "argv", ["train.py", *(part for pair in given.items() for part in pair)])
    assert train.main() == 2
    said = capfd.readouterr()
    assert_hidden(said.out + said.err + records.getvalue())
    assert [path for path in tmp_path.rglob("*") if "data.example" in str(path)] == []


def test_metrics_have_no_secret_in_their_labels(records):
    metrics = repr(list(StatusCollector([PLANTED]).collect()))
    assert "data.example/x.parquet" in metrics
    assert_hidden(metrics + records.getvalue())


def test_a_run_is_recorded_without_the_secrets_of_its_config(tmp_path):
    from sdtrain.config import TrainConfig, load_config
    from sdtrain.training.run_dir import RunDir

    content = load_config("tiny").model_dump() | {"init_from": PLANTED}
    config = parse_settings(TrainConfig, content, "a config")
    RunDir(tmp_path / "run").begin(config, 0)
    RunDir(tmp_path / "run").check_config(config)
    assert files_with(tmp_path, SPELLINGS) == []


def test_a_recipe_that_was_recorded_with_a_secret_loses_it(tmp_path):
    """By an earlier version, or by hand."""
    dataset = DatasetDir(tmp_path / "data")
    dataset.root.mkdir()
    recipe = make_recipe(Path("x"), select={"metadata": PLANTED})
    dataset.recipe.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert record_recipe(dataset, recipe) == []
    changed = record_recipe(dataset, make_recipe(Path("x"), select={"metadata": PLANTED.replace("x.p", "y.p")}))
    assert len(changed) == 1
    assert_hidden(changed[0])
    with suppress(UserError):
        find_metadata(PLANTED)
    assert files_with(tmp_path, SPELLINGS) == []
