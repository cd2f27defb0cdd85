"""A proxy in front of an S3 endpoint that fails on purpose."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ANSWERS = {
    "slow down": (503, "SlowDown", "Please reduce your request rate."),
    "internal error": (500, "InternalError", "We encountered an internal error."),
}
# drop: before the request is done; lost: after it, with no answer; cut: in the middle of the answer
KINDS = (*ANSWERS, "drop", "lost", "cut")


class FaultyProxy:
    """share: of the requests that fail. every: each request fails the first time that it is made.
    kinds: how. failed: failures by operation and kind, for a test to see that it tested something.
    writes_left: after so many requests that change something every connection is dropped, as if
    whoever makes them had died; the last of them is done, and its answer is lost.
    """

    def __init__(self, target: str, seed: int = 0) -> None:
        self.target = urlsplit(target).netloc
        self.share, self.every, self.kinds = 0.0, False, KINDS
        self.failed: Counter[tuple[str, str]] = Counter()
        self.writes_left: int | None = None
        self._silent_until = 0.0
        self._chance = random.Random(seed)
        self._seen: set[tuple[str, str]] = set()
        self._mutex = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(OSError):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def answer(self) -> None:
                proxy._answer(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 100

            def handle_error(self, request: object, client_address: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def fall_silent(self, seconds: float) -> None:
        """Drops every connection for a while."""
        self._silent_until = time.monotonic() + seconds

    def _choose(self, method: str, path: str) -> str | None:
        with self._mutex:
            kind = None
            if time.monotonic() < self._silent_until or self.writes_left == 0:
                kind = "drop"
            elif self.writes_left is not None and method not in ("GET", "HEAD"):
                self.writes_left -= 1
                kind = "lost" if self.writes_left == 0 else None
            elif self.every and (method, path) not in self._seen:
                self._seen.add((method, path))
                kind = self._chance.choice(self.kinds)
            elif self._chance.random() < self.share:
                kind = self._chance.choice(self.kinds)
            if kind:
                self.failed[_operation(method, path), kind] += 1
        return kind

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = _read_body(request)
        kind = self._choose(request.command, request.path)
        if kind == "drop":
            return _hang_up(request)
        if kind in ANSWERS:
            status, code, message = ANSWERS[kind]
            text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            return _reply(request, status, {"Content-Type": "application/xml"}, text)
        connection = http.client.HTTPConnection(self.target, timeout=60)
        connection.request(request.command, request.path, body, dict(request.headers.items()))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if kind == "lost":
            return _hang_up(request)
        headers = {name: value for name, value in answer.getheaders() if name not in _OF_A_HOP}
        length = answer.getheader("Content-Length") if request.command == "HEAD" else None
        _reply(request, answer.status, headers, content, length, cut=kind == "cut")

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


_OF_A_HOP = ("Connection", "Transfer-Encoding", "Content-Length", "Date", "Server")


def _operation(method: str, path: str) -> str:
    """As S3's documentation calls it, roughly."""
    _, _, query = path.partition("?")
    if method == "GET":
        return "ListObjects" if "list-type" in query else "GetObject"
    if method == "POST":
        return "DeleteObjects" if "delete" in query else "MultipartUpload"
    if method == "PUT" and "uploadId" in query:
        return "MultipartUpload"
    return f"{method.title()}Object"


def _read_body(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))
    return b"".join(_chunks(request))


def _chunks(request: BaseHTTPRequestHandler) -> Iterator[bytes]:
    del request.headers["Transfer-Encoding"]
    while size := int(request.rfile.readline().split(b";")[0], 16):
        yield request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()


def _reply(
    request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes,
    length: str | None = None, cut: bool = False,
) -> None:  # fmt: skip
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    if status not in (204, 304):
        request.send_header("Content-Length", length or str(len(content)))
    request.end_headers()
    if cut:
        request.wfile.write(content[: len(content) // 2])
        return _hang_up(request)
    if request.command != "HEAD":
        request.wfile.write(content)


def _hang_up(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True
    with contextlib.suppress(OSError):
        request.wfile.flush()
        request.connection.shutdown(socket.SHUT_RDWR)
