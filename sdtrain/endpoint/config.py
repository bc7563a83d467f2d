"""The server that is asked, and how much it may cost."""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from sdtrain.redaction import holds_secret, remember_secret
from sdtrain.settings import Settings

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _server(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("not the address of a server, such as http://127.0.0.1:8000/v1")
    if holds_secret(url):
        raise ValueError("it must not hold a user, a password or a query; name the key's variable in api_key_env")
    return url.rstrip("/")


def _variable(name: Any) -> Any:
    if isinstance(name, str) and not _VARIABLE.fullmatch(name):
        remember_secret(name)  # the message below shows what was given, which may be the key itself
        raise ValueError("not the name of an environment variable; put the key there and its name here")
    return name


class EndpointConfig(Settings):
    """A server for chat completions that speaks OpenAI's protocol. It is the user's own: private addresses are fine."""

    url: Annotated[str, AfterValidator(_server)]
    """Its base address, such as http://127.0.0.1:8000/v1."""
    model: str = Field(min_length=1)
    """The model's name, as the server lists it under /models."""
    api_key_env: Annotated[str | None, BeforeValidator(_variable)] = None
    """The environment variable that holds the key; the key itself is never written anywhere."""
    concurrency: int = Field(default=32, ge=1, le=4096)
    """Requests in flight. A server that batches is fastest with as many as it has room for."""
    timeout_s: float = Field(default=120, gt=0)
    """Time for one attempt, from the connection to the whole answer."""
    retries: int = Field(default=5, ge=0)
    """Further attempts after an answer that is broken or does not come in time."""
    patience_s: float = Field(default=600, ge=0)
    """How long to wait for a server that is busy (429, 503) or does not accept connections, as while it restarts."""
    seed: int = 0
    prompt_price: float = Field(default=0, ge=0)
    """US dollars per million tokens of questions, images included."""
    completion_price: float = Field(default=0, ge=0)
    """US dollars per million tokens of answers."""
    max_cost: float | None = Field(default=None, gt=0)
    """US dollars after which no more is asked; answers in flight are still paid for and kept."""
    max_total_tokens: int | None = Field(default=None, ge=1)
    """Tokens of questions and answers after which no more is asked."""

    @model_validator(mode="after")
    def _cost_has_prices(self) -> EndpointConfig:
        if self.max_cost is not None and not self.prompt_price + self.completion_price:
            raise ValueError("max_cost needs prompt_price and completion_price, in dollars per million tokens")
        return self

    @property
    def has_budget(self) -> bool:
        """Whether spending is limited."""
        return self.max_cost is not None or self.max_total_tokens is not None

    def described(self) -> dict[str, Any]:
        """The settings that determine the answers: not where the server runs, nor how fast it is asked."""
        return {"model": self.model, "seed": self.seed}
