"""One server, asked with retries."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import aiohttp

from sdtrain.download.http.retry import backoff_s
from sdtrain.endpoint.answers import Answer, parse_answer
from sdtrain.endpoint.config import EndpointConfig
from sdtrain.endpoint.failures import (
    BrokenAnswerError,
    EndpointError,
    RejectedError,
    ServerBusyError,
    failure_of_status,
)
from sdtrain.endpoint.messages import Request, body_of, grey_jpeg
from sdtrain.redaction import remember_secret, without_secrets
from sdtrain.settings import nearest

_MOST_BYTES = 4 << 20
_MOST_REJECTED = 20  # before the first answer: then it is no matter of single requests
_MOST_FAILED = 20  # in a row: then the server may have broken down
# Fields that some servers or models do not know, or only with another value.
_OPTIONAL = ("logprobs", "top_logprobs", "temperature", "seed")
_IS_ABOUT_A_FIELD = re.compile(
    r"support|extra|unknown|unrecogni|permitted|allowed|unexpected|instead|less than|at most", re.I
)
_given_up = dict[str, float]()
"""Servers that a client of this process gave up, and when: the next batches of a build do not wait as long, each."""
_log = logging.getLogger(__name__)


class Client:
    """Asks one server: `async with Client(config, setting) as client`; `setting` names its section in messages.

    No redirect is followed, because the key and the images are meant for this server, and no proxy is used.
    """

    def __init__(self, config: EndpointConfig, setting: str) -> None:
        self._config, self._setting = config, setting
        self._headers = _headers(config, setting)
        self._open_at = 0.0
        self._num_answered = self._num_rejected = self._num_failed = 0
        self._fields = _Fields()

    async def __aenter__(self) -> Client:
        limits = aiohttp.ClientTimeout(total=self._config.timeout_s)
        connector = aiohttp.TCPConnector(limit=self._config.concurrency)
        self._session = aiohttp.ClientSession(connector=connector, timeout=limits, headers=self._headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def ask(self, request: Request) -> Answer:
        """Asks until there is an answer, of whatever kind; EndpointError if the server or a setting is at fault."""
        now, patience_s = time.monotonic(), self._config.patience_s
        is_given_up = now - _given_up.get(self._config.url, -math.inf) < patience_s
        give_up_at = now + (0 if is_given_up else patience_s)
        num_broken = num_busy = 0
        while True:
            await self._wait_until_open()
            try:
                return self._counted(await self._attempt(request))
            except RejectedError as rejected:
                return await self._rejected(request, rejected)
            except ServerBusyError as busy:
                num_busy += 1
                pause_s = busy.retry_after_s or backoff_s(num_busy)
                if time.monotonic() + pause_s > give_up_at:
                    raise self._unavailable(str(busy)) from None
                self._open_at = max(self._open_at, time.monotonic() + pause_s)
            except BrokenAnswerError as broken:
                num_broken += 1
                if num_broken > self._config.retries or is_given_up:
                    return await self._failed(request, broken)
                await asyncio.sleep(backoff_s(num_broken))

    async def check(self) -> str:
        """Describes the model that will answer; EndpointError if the server does not, or does not have it."""
        try:
            listed = await self._json("GET", "/models", None)
            names = [str(model["id"]) for model in listed["data"]]
        except (BrokenAnswerError, ServerBusyError, RejectedError) as failure:
            raise self._unavailable(str(failure)) from None
        except (KeyError, TypeError):
            raise EndpointError(f"{self._setting}.url: {self._config.url}/models does not list models.") from None
        if self._config.model not in names:
            await self._try_unlisted(names)
        return f"{self._config.model} at {self._config.url}"

    async def _try_unlisted(self, names: list[str]) -> None:
        """Some servers have more than they list: a question of one token tells."""
        try:
            await self._attempt(Request("Hi", max_tokens=1))
        except (BrokenAnswerError, ServerBusyError, RejectedError, EndpointError) as failure:
            raise EndpointError(
                f"{self._setting}.model: {self._config.url} does not have '{self._config.model}'."
                f"{nearest(self._config.model, names)} It says: {failure}"
            ) from None

    async def _attempt(self, request: Request) -> Answer:
        while True:
            body = self._fields.of(body_of(request, self._config))
            try:
                return parse_answer(await self._json("POST", "/chat/completions", body), request.max_tokens)
            except RejectedError as rejected:
                if not self._fields.adapt(str(rejected), body):
                    raise

    async def _json(self, method: str, path: str, body: Any) -> Any:
        url = self._config.url + path
        try:
            async with self._session.request(method, url, json=body, allow_redirects=False) as response:
                content = await _limited(response)
                if response.status != 200:
                    raise failure_of_status(response.status, response.headers, content, self._setting, self._config.url)
        except TimeoutError:
            raise BrokenAnswerError(f"no answer within {self._config.timeout_s:g} s") from None
        except aiohttp.ClientConnectorCertificateError as error:
            raise EndpointError(f"{self._setting}.url: the certificate of {url} is not valid: {error}.") from None
        except aiohttp.ClientConnectorError as error:
            raise ServerBusyError(f"no connection: {error.strerror or error}") from None
        except aiohttp.ClientError as error:
            raise BrokenAnswerError(f"the connection failed: {type(error).__name__}") from None
        try:
            return json.loads(content)
        except ValueError:
            raise BrokenAnswerError("the answer is not JSON") from None

    async def _wait_until_open(self) -> None:
        """Waits as long as the server asked any request to."""
        while (pause_s := self._open_at - time.monotonic()) > 0:
            await asyncio.sleep(pause_s)

    def _counted(self, answer: Answer) -> Answer:
        self._num_answered += 1
        self._num_failed = 0
        _given_up.pop(self._config.url, None)
        if answer.usage is None and self._config.has_budget:
            raise EndpointError(
                f"{self._setting}: {self._config.url} does not report its usage, so that a budget cannot be kept. "
                "Remove max_cost and max_total_tokens, or ask a server that reports it."
            )
        return answer

    async def _rejected(self, request: Request, rejected: RejectedError) -> Answer:
        self._num_rejected += 1
        is_all = not self._num_answered and self._num_rejected >= _MOST_REJECTED
        if is_all and not await self._is_alive(request):
            raise EndpointError(f"{self._setting}: {self._config.url} rejects every request: {rejected}.")
        return Answer("rejected", detail=without_secrets(str(rejected)))

    async def _failed(self, request: Request, broken: BrokenAnswerError) -> Answer:
        self._num_failed += 1
        if (not self._num_answered or self._num_failed >= _MOST_FAILED) and not await self._is_alive(request):
            raise self._unavailable(str(broken)) from None
        return Answer("failed", detail=without_secrets(str(broken)))

    async def _is_alive(self, request: Request) -> bool:
        """Whether a harmless request of the same kind is answered, so that the failed ones are at fault themselves."""
        try:
            await self._attempt(Request("Hi", tuple(grey_jpeg() for _ in request.images), max_tokens=1))
        except (BrokenAnswerError, ServerBusyError, RejectedError):
            return False
        self._num_answered, self._num_failed = self._num_answered + 1, 0
        return True

    def _unavailable(self, detail: str) -> EndpointError:
        _given_up[self._config.url] = time.monotonic()
        return EndpointError(
            f"{self._setting}.url: {self._config.url} does not answer ({detail}). Start the server, or check the "
            "address; run the same command to go on."
        )


class _Fields:
    """Leaves out or renames fields of requests that this server does not accept, as it says at the first of them."""

    def __init__(self) -> None:
        self._left_out: set[str] = set()
        self._renamed: dict[str, str] = {}
        self._most_logprobs: int | None = None

    def adapt(self, complaint: str, sent: Mapping[str, Any]) -> bool:
        """Returns whether the complaint is about a field that was sent, and the request is worth another attempt.

        Requests in flight together all complain of the same field.
        """
        if not _IS_ABOUT_A_FIELD.search(complaint):
            return False
        named = {name for name in _OPTIONAL if name in sent and re.search(rf"(?<![a-z]){name}\b", complaint)}
        if "max_tokens" in sent and "max_completion_tokens" in complaint:
            self._renamed["max_tokens"] = "max_completion_tokens"
            return True
        numbers = map(int, re.findall(r"\b\d{1,2}\b", complaint)) if "logprobs" in complaint else ()
        if fewer := [number for number in numbers if 0 < number < sent.get("top_logprobs", 0)]:
            self._most_logprobs = max(fewer)  # "greater than max allowed: 5"
            return True
        if "temperature" in named - self._left_out:
            _log.warning("The server takes no temperature 0, and draws its answers at random: %s", complaint)
        self._left_out |= named | ({"logprobs", "top_logprobs"} if named & {"logprobs", "top_logprobs"} else set())
        return bool(named)

    def of(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body as this server accepts it."""
        kept = {self._renamed.get(name, name): value for name, value in body.items() if name not in self._left_out}
        if self._most_logprobs is not None and "top_logprobs" in kept:
            kept["top_logprobs"] = min(kept["top_logprobs"], self._most_logprobs)
        return kept


def _headers(config: EndpointConfig, setting: str) -> dict[str, str]:
    if config.api_key_env is None:
        return {}
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise EndpointError(f"{setting}.api_key_env: the environment variable {config.api_key_env} is not set.")
    remember_secret(key)
    if not key.isascii() or not key.isprintable():
        raise EndpointError(f"{setting}.api_key_env: the value of {config.api_key_env} cannot be sent as a key.")
    return {"Authorization": f"Bearer {key}"}


async def _limited(response: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    async for part in response.content.iter_any():
        content += part
        if len(content) > _MOST_BYTES:
            raise BrokenAnswerError(f"the answer is longer than {_MOST_BYTES:,} bytes")
    return bytes(content)
