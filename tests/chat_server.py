"""A server for chat completions on loopback, whose answers and faults a test chooses."""

import base64
import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "tiny-vlm"


@dataclass(frozen=True)
class Reply:
    """One HTTP answer; a truncated one ends early, a dropped one never begins."""

    body: bytes = b""
    status: int = 200
    headers: dict = field(default_factory=dict)
    fault: str = ""
    pause_s: float = 0


def completion(text, finish="stop", usage=(100, 10), logprobs=None, **message):
    """A chat completion as vLLM writes it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text} | message, "finish_reason": finish}
    if logprobs is not None:
        alternatives = [{"token": token, "logprob": value} for token, value in logprobs.items()]
        choice["logprobs"] = {"content": [alternatives[0] | {"top_logprobs": alternatives}]}
    content = {"id": "chatcmpl-1", "object": "chat.completion", "model": MODEL, "choices": [choice]}
    if usage:
        content["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return Reply(json.dumps(content).encode())


def error(status, message, code=None, **headers):
    """An error as OpenAI writes it; header names with underscores."""
    body = json.dumps({"error": {"message": message, "type": "error", "code": code}}).encode()
    return Reply(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass(frozen=True)
class Asked:
    """One request that the server received."""

    body: dict
    headers: dict

    @property
    def prompt(self):
        """The words."""
        return next(part["text"] for part in self.body["messages"][0]["content"] if part["type"] == "text")

    @property
    def images(self):
        """The files."""
        parts = [part for part in self.body["messages"][0]["content"] if part["type"] == "image_url"]
        return [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in parts]


class ChatServer(ThreadingHTTPServer):
    """Answers by `reply(asked)`; `asked` are the questions so far, `most_at_once` how many were open together."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, reply, models=(MODEL,)):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.models = reply, models
        self.asked, self.most_at_once, self._open = [], 0, 0
        self.lock = threading.Lock()

    @property
    def url(self):
        """Its base address."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def answer(self, asked):
        """Counts the question and answers it."""
        with self.lock:
            self.asked.append(asked)
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
        try:
            reply = self.reply(asked)
            time.sleep(reply.pause_s)
            return reply
        finally:
            with self.lock:
                self._open -= 1

    def handle_error(self, request, client_address):
        """A client that left in the middle is none of the test's business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        models = [{"id": name, "object": "model"} for name in self.server.models]
        self._send(Reply(json.dumps({"object": "list", "data": models}).encode()))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(self.server.answer(Asked(body, dict(self.headers))))

    def _send(self, reply):
        if reply.fault == "dropped":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body[: len(reply.body) // 2] if reply.fault == "truncated" else reply.body)
        self.close_connection = self.close_connection or reply.fault == "truncated"

    def log_message(self, *arguments):
        """Nothing."""


@contextmanager
def chat_server(reply, models=(MODEL,)):
    """A running `ChatServer`."""
    server = ChatServer(reply, models)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
