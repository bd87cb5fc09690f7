"""Requests over HTTP, their bytes streamed as they come.

    POST /generate   {"prompt": "def ", "max_tokens": 64}  ->  raw bytes, in chunks
    GET  /metrics    figures of the run so far, JSON

The device belongs to one thread, the `Worker`; a thread per connection waits for its bytes.
"""

import json
import queue
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from serving.scheduler import Request, Scheduler

MAX_BODY = 1 << 20  # bytes
MAX_LINGER = 5.0  # seconds


class Worker(threading.Thread):
    """Steps the scheduler as long as there are requests; others only hand them over."""

    def __init__(self, scheduler: Scheduler):
        super().__init__(name="worker", daemon=True)
        self.scheduler = scheduler
        self.error: BaseException | None = None
        self._is_over = False
        self._lock = threading.Lock()  # nothing arrives behind the end
        self._arrivals: queue.SimpleQueue[Request | None] = queue.SimpleQueue()

    def submit(self, request: Request) -> None:
        """Hand a request over; ValueError where it could never end."""
        self.scheduler.check(request)
        with self._lock:
            if self._is_over:
                raise RuntimeError(f"the worker has stopped: {self.error!r}")
            self._arrivals.put(request)

    def stop(self) -> None:
        self._arrivals.put(None)
        self.join()

    def run(self) -> None:
        try:
            while self._take_arrivals():
                self.scheduler.step()
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._end_all()

    def _take_arrivals(self) -> bool:
        """Queue what has come, waiting where there is nothing else to do; False at the end."""
        while self.scheduler.is_idle or not self._arrivals.empty():
            request = self._arrivals.get()
            if request is None:
                return False
            self.scheduler.submit(request)
        return True

    def _end_all(self) -> None:
        """Let nobody wait for a worker that has stopped."""
        with self._lock:
            self._is_over = True
        left = [*self.scheduler.active, *self.scheduler.waiting]
        while not self._arrivals.empty():
            if request := self._arrivals.get():
                left.append(request)
        for request in left:
            request.on_end()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    worker: Worker  # of the subclass that `make_server` makes

    def do_GET(self) -> None:
        if self.path != "/metrics":
            return self._answer(404, {"error": "GET /metrics or POST /generate"})
        self._answer(200, self.worker.scheduler.telemetry.summary())

    def do_POST(self) -> None:
        if self.path != "/generate":
            return self._answer(404, {"error": "GET /metrics or POST /generate"})
        arrivals: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        try:
            request = Request(
                *self._read_arguments(),
                on_token=arrivals.put,
                on_end=lambda: arrivals.put(None),
            )
            self.worker.submit(request)
        except ValueError as error:
            return self._answer(400, {"error": str(error)})
        except RuntimeError as error:
            return self._answer(503, {"error": str(error)})
        try:
            self._stream(arrivals, request)
        except (BrokenPipeError, ConnectionResetError):
            request.is_cancelled = True  # nobody listens any more

    def _read_arguments(self) -> tuple[bytes, int]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY:
            raise ValueError(
                f"Content-Length must say from 0 to {MAX_BODY} bytes; got {length or 'none'}"
            )
        try:
            arguments = json.loads(self.rfile.read(int(length)))
        except RecursionError as error:
            raise ValueError(f"the body is nested too deep: {error}") from error
        if not isinstance(arguments, dict) or not isinstance(arguments.get("prompt"), str):
            raise ValueError('the body must be {"prompt": text, "max_tokens": number}')
        if unknown := arguments.keys() - {"prompt", "max_tokens"}:
            raise ValueError(
                f"the body must have prompt and max_tokens alone; got {', '.join(sorted(unknown))}"
            )
        max_tokens = arguments.get("max_tokens", 64)
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool):
            raise ValueError(f"max_tokens must be an integer; got {max_tokens!r}")
        return arguments["prompt"].encode(), max_tokens

    def _stream(self, arrivals: queue.SimpleQueue, request: Request) -> None:
        """Bytes as chunks; a request that did not come to its end leaves the stream open-ended.

        In HTTP/1.0, which has no chunks, hanging up is the end.
        """
        is_chunked = self.request_version != "HTTP/1.0"
        self.send_response(200)
        # A byte-level model may write what is no UTF-8.
        self.send_header("Content-Type", "application/octet-stream")
        if is_chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        while (token := arrivals.get()) is not None:
            self.wfile.write((b"1\r\n%c\r\n" if is_chunked else b"%c") % token)
        if request.ended is None:
            self.close_connection = True
        elif is_chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:
            # What is left of the request's body must not be read as the next request.
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing a request: the figures are in /metrics."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # a burst of requests is not refused

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up is no error of the server."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        """Hang up, once the client has too or `MAX_LINGER` has passed.

        A socket closed with input unread resets the connection: who is answered before all of the
        request is sent would fail at sending the rest, and might never see the answer.
        """
        end = time.monotonic() + MAX_LINGER
        try:
            request.shutdown(socket.SHUT_WR)
            while (left := end - time.monotonic()) > 0:
                request.settimeout(left)
                if not request.recv(1 << 16):
                    break
        except OSError:
            pass  # it is closed next
        self.close_request(request)


def make_server(worker: Worker, host: str, port: int) -> Server:
    """Bound and ready for `serve_forever`; port 0 takes a free one."""
    return Server((host, port), type("WorkerHandler", (Handler,), {"worker": worker}))
