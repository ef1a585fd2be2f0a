"""A server that speaks OpenAI's protocol on loopback, and misbehaves as it is told."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

from tests.support.videos import read_number


class CaptionServer:
    """Answers "frames 3 and 7" about numbered frames, and repeats a question without frames.

    misbehave  is called with the answer and how often it was asked for before; returns True where it has sent something
    """

    def __init__(self, misbehave: Callable[[BaseHTTPRequestHandler, str, int], bool] = lambda *_: False) -> None:
        self.misbehave = misbehave
        self.asked: Counter[str] = Counter()  # answers that were asked for
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.under_way, self.most_under_way = 0, 0
        self.lock, self.has_ended = threading.Lock(), threading.Event()

    def __enter__(self) -> CaptionServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # of five, a busy machine would reset what two processes send at once
            daemon_threads = True

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.has_ended.set()
        self.http.shutdown()
        self.http.server_close()

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        said = describe(body)
        with self.lock:
            self.requests.append(body)
            self.keys.add(request.headers.get("Authorization"))
            before = self.asked[said]
            self.asked[said] += 1
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if not self.misbehave(request, said, before):
                send(request, 200, answer(said))
        finally:
            with self.lock:
                self.under_way -= 1


def describe(body: dict[str, Any]) -> str:
    content = body["messages"][0]["content"]
    if isinstance(content, str):
        return f"about {content}"
    numbers = []
    for part in content[:-1]:
        header, _, data = part["image_url"]["url"].partition(",")
        assert header == "data:image/jpeg;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert picture.format == "JPEG"
        numbers.append(read_number(np.asarray(picture)))
    return "frames " + " and ".join(map(str, numbers))


def answer(text: object, finish: str = "stop") -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish}]}).encode()


def send(request: BaseHTTPRequestHandler, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
    """Send an answer; with a `length` that is not the body's, only the beginning of one."""
    request.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(body) if length is None else length)}.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    request.wfile.write(body)
    request.close_connection = True
