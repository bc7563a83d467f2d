"""Serves a captioner for the demo's images, as an OpenAI-compatible server would serve a large one.

By hand: `python -m sdtrain.demo.captioner --port 8000` (Ctrl-C ends it). It looks at pixels only, as the demo's checker
does, and declines where it sees no single shape.
"""

from __future__ import annotations

import argparse
import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from sdtrain.demo.checker import classify
from sdtrain.errors import UserError

MODEL = "demo-captioner"
REFUSAL = "I'm sorry, I cannot describe this image."
_LOOKED_AT_PX = 64  # what the checker was tuned for
_START_S = 30.0


def describe(image: Image.Image) -> str:
    """Names the colour and shape in an RGB image of any size, or declines."""
    side = min(image.size)
    seen = classify(_centre(image, side).resize((_LOOKED_AT_PX, _LOOKED_AT_PX), Image.Resampling.LANCZOS))
    return f"a {seen.color} {seen.shape}" if seen.color and seen.shape else REFUSAL


def application() -> Starlette:
    """The server's two routes: its models, and chat completions about one image."""
    return Starlette(
        routes=[
            Route("/v1/models", _models),
            Route("/v1/chat/completions", _complete, methods=["POST"]),
        ]
    )


@contextmanager
def serve_captioner(port: int = 0) -> Iterator[str]:
    """Serves on loopback while the block runs; yields the base address, such as http://127.0.0.1:8000/v1.

    UserError if the port is in use.
    """
    config = uvicorn.Config(application(), host="127.0.0.1", port=port, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="captioner", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{_port(server, thread)}/v1"
    finally:
        server.should_exit = True
        thread.join()


def _port(server: uvicorn.Server, thread: threading.Thread) -> int:
    deadline = time.monotonic() + _START_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise UserError(f"The demo's captioner cannot listen on port {server.config.port} of 127.0.0.1.")
        time.sleep(0.01)
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


def _centre(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


async def _models(request: Request) -> JSONResponse:
    return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "sdtrain"}]})


def _complete_one(content: dict[str, Any]) -> dict[str, Any]:
    parts = content["messages"][-1]["content"]
    image = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    text = describe(Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).convert("RGB"))
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    num_tokens = len(text.split())
    usage = {"prompt_tokens": 1, "completion_tokens": num_tokens, "total_tokens": 1 + num_tokens}
    return {
        "id": "demo",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [choice],
        "usage": usage,
    }


async def _complete(request: Request) -> JSONResponse:
    try:
        return JSONResponse(_complete_one(await request.json()))
    except (KeyError, IndexError, TypeError, ValueError, StopIteration, OSError) as error:
        return JSONResponse({"error": {"message": f"no question about an image: {error!r}"}}, status_code=400)


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    uvicorn.run(application(), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
