"""Requests a second of the endpoint's client against a server that answers at once, on the same cores.

    python -m tests.benchmarks.endpoint [--quick]

The server is a process of its own that reads each request whole, with its image (`kb_per_image`), and answers with a
fixed completion. What remains is the client's own cost: the JSON body with the image in base64, the connection, the
answer, and the bookkeeping of order, retries and budget. Images are encoded beforehand, because that is measured by the
stage: `encoded` says how many a core encodes a second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from multiprocessing.connection import Connection

from sdtrain.endpoint.ask import ask
from sdtrain.endpoint.budget import Budget
from sdtrain.endpoint.config import EndpointConfig
from sdtrain.endpoint.messages import Request, jpeg_of
from sdtrain.images.decode import decode_rgb
from tests.benchmarks.photos import draw_photo

SENT_PX, CONCURRENCY = 512, 64
TARGET_PER_S = 500
MODEL = "instant"


def _serve(ready: Connection) -> None:
    from aiohttp import web

    message = {"role": "assistant", "content": "A house by the sea on a summer day."}
    body = json.dumps(
        {
            "model": MODEL,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 300, "completion_tokens": 9},
        }
    ).encode()

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=body, content_type="application/json")

    async def run() -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ready.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


def measure(num_requests: int) -> dict[str, float]:
    """Rates a second: of requests, by the clock and by this process's processor time, and of encoded images."""
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(there,), daemon=True)
    server.start()
    try:
        photo = decode_rgb(draw_photo(0))
        began = time.process_time()
        jpegs = [jpeg_of(photo, SENT_PX) for _ in range(50)]
        encoded = 50 / (time.process_time() - began)
        config = EndpointConfig(url=f"http://127.0.0.1:{here.recv()}/v1", model=MODEL, concurrency=CONCURRENCY)
        requests = [Request("Describe.", (jpegs[0],)) for _ in range(num_requests)]
        ask(config, requests[:CONCURRENCY], "benchmark")
        clock, cpu = time.perf_counter(), time.process_time()
        answers = ask(config, requests, "benchmark", Budget(config))
        rates = {"requests_per_s": num_requests / (time.perf_counter() - clock)}
        rates["requests_per_cpu_s"] = num_requests / (time.process_time() - cpu)
        assert all(answer.kind == "text" for answer in answers)
        return rates | {"encoded_per_cpu_s": encoded, "kb_per_image": len(jpegs[0]) / 1e3}
    finally:
        server.terminate()
        server.join()


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2,000 requests instead of 20,000")
    rates = measure(2_000 if parser.parse_args().quick else 20_000)
    print(json.dumps({name: round(value, 1) for name, value in rates.items()} | {"target": TARGET_PER_S}))


if __name__ == "__main__":
    main()
