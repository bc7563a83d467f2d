"""Secrets leave texts whichever way they got in, and nothing else does."""

import io
import logging
import sys
import threading
from urllib.parse import quote, quote_plus

import pytest

from sdtrain import redaction
from sdtrain.errors import UserError
from sdtrain.redaction import as_recorded, hide_secrets_in_logs, holds_secret, remember_secrets, safe_error
from sdtrain.redaction import without_secrets as shown

PASSWORD, SIGNATURE = "p4ss/w0rd@of:me", "S1g+nature/of=the test"


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    monkeypatch.setattr(redaction, "_known", set())


@pytest.fixture
def hooks():
    before = logging.getLogRecordFactory(), sys.excepthook, threading.excepthook
    hide_secrets_in_logs()
    yield
    logging.setLogRecordFactory(before[0])
    sys.excepthook, threading.excepthook = before[1:]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("https://me:pw@e.com:8/x/*.parquet?sig=1#f", "https://e.com:8/x/*.parquet"),
        ("GET error on 'https://h/x?X-Amz-Signature=a%2Fb' (HTTP 403).", "GET error on 'https://h/x' (HTTP 403)."),
        ("Max retries exceeded with url: /x?sig=abc (Caused by", "Max retries exceeded with url: /x (Caused by"),
        ("s3://b/x.parquet?s3_access_key_id=A&s3_secret_access_key=B: no", "s3://b/x.parquet: no"),
        ("postgresql://u:p/w@db:5432/x?sslpassword=q", "postgresql://db:5432/x"),
        ("redis://:pw@h:6379/0 and (https://h/?a=b), done.", "redis://h:6379/0 and (https://h/), done."),
        ("hf://user:token@datasets/a/b@~parquet/x.parquet", "hf://datasets/a/b@~parquet/x.parquet"),
        ("https%3A%2F%2Fh%2Fx%3Fsig%3Dabc is", "https://h/x is"),
        ("/home/me/https:/u:p@h/x?sig=1 is", "/home/me/https:/h/x is"),
        ("host=h password=hunter2 user=u", "host=h password=… user=u"),
        ("{'aws_secret_access_key': 'abc', 'x': 1}", "{'aws_secret_access_key': '…', 'x': 1}"),
        ("Authorization: Bearer abc.def", "Authorization: …"),
        ("user:pw@proxy:80 refused", "proxy:80 refused"),
        ("hf_" + "a" * 34 + " and AKIA" + "A" * 16, "… and …"),
    ],
)  # fmt: skip
def test_secrets_leave_a_text(text, wanted):
    assert shown(text) == wanted
    assert str(UserError(text)) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/a/b/part-?.parquet, /data/part-?/year=2020/x.parquet",
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
        "unknown key 'limmit'. Did you mean 'limit'? Known: a=1",
        "ray://HEAD:10001 and http://127.0.0.1:4200/api do not answer: token 5 of 7",
        "tokens=5, num_tokens: '3', key=00012 at 12:30:05",
        "There is no region 'us-est-1'. Did you mean 'us-east-1'?",
    ],
)
def test_what_is_no_secret_stays(text):
    remember_secrets("s3://b/x?s3_region=us-east-1&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature=0123456789abcdef")
    assert shown(text) == text


@pytest.mark.parametrize("change", [str, quote, quote_plus, str.upper, lambda text: quote(quote(text))])
def test_a_remembered_secret_leaves_in_every_spelling_without_its_url(change):
    remember_secrets(
        {"any": [f"https://me:{quote(PASSWORD, safe='')}@h/x?X-Signature={quote(SIGNATURE, safe='')}&n=1 'x'"]}
    )
    for secret in (PASSWORD, SIGNATURE):
        assert change(secret) not in shown(f"the server says_{change(secret)}_is wrong")
    assert shown("n 1 is no secret, and nor is x") == "n 1 is no secret, and nor is x"


def test_a_secret_of_the_environment_leaves(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SIGNATURE)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pr0xy-password@proxy:8080")
    assert shown(f"{SIGNATURE} | pr0xy-password | {quote_plus(SIGNATURE)}") == "… | … | …"


def test_records_keep_where_a_url_leads_and_not_its_credential():
    url = "s3://b/x.parquet?s3_secret_access_key=abc"
    recorded = as_recorded({"a": [url, "hf://b/?.parquet", "https://h/x"], "b": 1})
    assert recorded == {"a": ["s3://b/x.parquet?credential-not-recorded", "hf://b/?.parquet", "https://h/x"], "b": 1}
    assert as_recorded(recorded) == recorded
    assert [holds_secret(u) for u in (url, "https://u@h/x", "https://h/x?a", "https://h/x")] == [
        True,
        True,
        True,
        False,
    ]


def test_logs_and_tracebacks_hold_no_secret(hooks, capsys):
    stream, logger = io.StringIO(), logging.getLogger("somebody's")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    url = "https://h/x?sig=s3cr3t"

    def fail():
        try:
            raise OSError(f"no answer from {url}")
        except OSError as error:
            raise ValueError("at all") from error

    try:
        fail()
    except ValueError as error:
        logger.exception("%s of %s: %d %%", "asked", url, 5)
        sys.excepthook(ValueError, error, error.__traceback__)
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    logger.removeHandler(handler)
    said, printed = stream.getvalue(), capsys.readouterr().err
    assert "asked of https://h/x: 5 %" in said
    assert said.count("no answer from https://h/x\n") == 1
    assert printed.count("no answer from https://h/x\n") == 2
    assert "s3cr3t" not in said + printed


def test_an_error_whose_cause_holds_a_secret_is_replaced_and_others_are_not():
    plain, cause = ValueError("no secret"), ValueError("https://h/?a=s3cr3t")
    assert safe_error(plain) is plain
    plain.__cause__ = cause
    shown_error = safe_error(plain)
    assert str(shown_error) == "ValueError: no secret"
    assert shown_error.__cause__ is None
    assert shown_error.__suppress_context__
