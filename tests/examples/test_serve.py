"""The server: every output is that of greedy generation without a cache, whatever else it serves.

Two ways of computing the same logits differ by rounding (here by less than 1e-5), so prompts are
drawn until on every byte of their output the best logit leads the runner-up by `LEAD`: no outcome
then rests on a tie, on any machine.
"""

import dataclasses
import http.client
import json
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serve
from byte_decoder import ByteDecoder, ModelConfig, generate_greedily, load_model, save_model
from flax import nnx
from serving import endpoint, telemetry
from serving.endpoint import Worker, make_server
from serving.engine import Engine
from serving.load import post
from serving.prefixes import PrefixIndex
from serving.scheduler import Request, Scheduler
from serving.telemetry import Telemetry

LEAD = 1e-3
MAX_TOKENS, NEW_TOKENS, TOKENS_IN_PAGES = 48, 16, 56
CONFIG = ModelConfig(layers=2, width=32, q_heads=6, kv_heads=2, head_dim=8, hidden=48)


def make_model(dtype: str) -> ByteDecoder:
    model = ByteDecoder(CONFIG, jnp.dtype(dtype), "xla", rngs=nnx.Rngs(0))
    for block in model.blocks:
        # At random, attention would hardly matter: let it decide which byte follows.
        block.attention.out.kernel[...] *= 8
    return model


def find_prompts(model: ByteDecoder, lead: float) -> dict[bytes, bytes]:
    """Sixteen prompts, most of which begin alike, and what follows them."""
    rng = np.random.default_rng(0)
    beginnings = [rng.bytes(length) for length in (9, 16, 20)]
    found: dict[bytes, bytes] = {}
    for _ in range(200):
        prompt = beginnings[rng.integers(3)] * int(rng.integers(2)) + rng.bytes(rng.integers(1, 12))
        output, leads = generate_greedily(model, prompt, NEW_TOKENS, padded_to=MAX_TOKENS)
        if leads.min() >= lead:
            found[prompt] = output
        if len(found) == 16:
            return found
    raise AssertionError(f"of 200 prompts only {len(found)} lead to no near tie")


def make_engine(model: ByteDecoder, page_size: int, implementation: str | None = None) -> Engine:
    engine = Engine(
        model,
        num_pages=TOKENS_IN_PAGES // page_size,
        page_size=page_size,
        max_tokens=MAX_TOKENS,
        max_batch=4,
        chunk_sizes=[4, 8],
        implementation=implementation,
    )
    # Pages that nobody has written must not matter.
    poisoned = {
        name: tuple(jnp.full_like(pages, jnp.nan) for pages in getattr(engine.cache, name))
        for name in ("k_pages", "v_pages")
    }
    engine.cache = dataclasses.replace(engine.cache, **poisoned)
    engine.warm_up()
    return engine


@pytest.fixture(scope="module")
def model() -> ByteDecoder:
    return make_model("float32")


@pytest.fixture(scope="module")
def prompts(model) -> dict[bytes, bytes]:
    return find_prompts(model, LEAD)


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    return make_engine(model, page_size=4)


def run_schedule(engine: Engine, prompts: dict[bytes, bytes], seed: int) -> list[Request]:
    """Random requests that arrive at random steps, one or none of them cancelled on the way."""
    rng = np.random.default_rng(seed)
    scheduler = Scheduler(engine)
    requests = [
        Request(list(prompts)[rng.integers(len(prompts))], int(rng.integers(1, NEW_TOKENS + 1)))
        for _ in range(rng.integers(2, 9))
    ]
    arrivals = sorted(rng.integers(0, 25, len(requests)).tolist())
    cancelled_at = int(rng.integers(0, 60))
    arriving = list(zip(arrivals, requests, strict=True))
    for step in range(1000):
        while arriving and arriving[0][0] <= step:
            scheduler.submit(arriving.pop(0)[1])
        if step == cancelled_at and scheduler.active:
            scheduler.active[rng.integers(len(scheduler.active))].is_cancelled = True
        if scheduler.is_idle and not arriving:
            break
        scheduler.step()
    check_no_page_is_lost(scheduler)
    return requests


def check_no_page_is_lost(scheduler: Scheduler) -> None:
    scheduler.prefixes.evict(scheduler.allocator.num_pages)
    assert scheduler.allocator.num_free == scheduler.allocator.num_pages


def is_right(request: Request, prompts: dict[bytes, bytes]) -> bool:
    want = prompts[request.prompt][: request.max_new_tokens]
    return want.startswith(request.output) if request.is_cancelled else request.output == want


def test_fifty_schedules_give_what_no_cache_gives(engine, prompts) -> None:
    compiled = set(engine.programs)
    served = []
    for seed in range(50):
        requests = run_schedule(engine, prompts, seed)
        assert all(is_right(request, prompts) for request in requests), f"schedule {seed}"
        served += requests
    # All that could go wrong has happened.
    assert sum(request.shared_tokens > 0 for request in served) > 50
    assert sum(request.preemptions for request in served) > 20
    assert sum(request.is_cancelled for request in served) > 5
    assert set(engine.programs) == compiled


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "implementation", "lead"), [("float32", "xla", LEAD), ("float16", "cute", 0.02)]
)
def test_schedules_on_a_gpu(dtype: str, implementation: str, lead: float) -> None:
    with jax.default_matmul_precision("highest"):
        model = make_model(dtype)
        prompts = find_prompts(model, lead)
        engine = make_engine(model, page_size=8, implementation=implementation)
        for seed in range(20):
            requests = run_schedule(engine, prompts, seed)
            assert all(is_right(request, prompts) for request in requests), f"schedule {seed}"


def test_a_wrong_page_would_be_noticed(engine, prompts, monkeypatch) -> None:
    """Prefixes known by their length alone share pages of other texts."""

    def digests(self, tokens):
        return [bytes([n]) for n in range(len(tokens) // self._allocator.page_size)]

    monkeypatch.setattr(PrefixIndex, "_digests", digests)
    requests = [request for seed in range(5) for request in run_schedule(engine, prompts, seed)]
    assert not all(is_right(request, prompts) for request in requests)


def test_requests_that_could_never_end_are_refused(engine) -> None:
    scheduler = Scheduler(engine)
    for prompt, max_new_tokens, message in [
        (b"", 4, "at least one byte"),
        (b"a", 0, "max_tokens must be at least 1; got 0"),
        (b"a" * 40, 9, "at most 48 in sum; got 49"),
    ]:
        with pytest.raises(ValueError, match=message):
            scheduler.submit(Request(prompt, max_new_tokens))
    assert scheduler.is_idle


@pytest.fixture
def server(engine):
    worker = Worker(Scheduler(engine))
    server = make_server(worker, "127.0.0.1", 0)
    worker.start()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, worker
    server.shutdown()
    server.server_close()
    worker.stop()
    check_no_page_is_lost(worker.scheduler)


def ask(server, method: str, path: str, body: str | Iterator[bytes] | None = None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body)
    return connection, connection.getresponse()


def test_bytes_are_streamed_over_http(server, model) -> None:
    server, _ = server
    want, _ = generate_greedily(model, b"def f", NEW_TOKENS, padded_to=MAX_TOKENS)
    assert post("127.0.0.1", server.server_port, b"def f", NEW_TOKENS) == want
    body = json.dumps({"prompt": "def f", "max_tokens": 5})
    _, response = ask(server, "POST", "/generate", body)
    assert [response.read(1) for _ in range(5)] == [bytes([byte]) for byte in want[:5]]
    assert response.read() == b""
    _, response = ask(server, "GET", "/metrics")
    figures = json.loads(response.read())
    assert figures["requests"] == 2
    assert figures["shared_tokens"] == 4


def test_bad_http_requests_are_answered(server) -> None:
    for method, path, body, status, message in [
        ("GET", "/", None, 404, "POST /generate"),
        ("POST", "/", "{}", 404, "POST /generate"),
        ("POST", "/generate", "{", 400, "Expecting"),
        ("POST", "/generate", "[" * 100_000, 400, "nested too deep"),
        ("POST", "/generate", iter([b"{}"]), 400, "Content-Length must say"),
        ("POST", "/generate", '{"prompt": "a", "max_tokens": true}', 400, "must be an integer"),
        ("POST", "/generate", '{"prompt": "a", "stop": "b"}', 400, "max_tokens alone; got stop"),
        ("POST", "/generate", '{"prompt": 1}', 400, "the body must be"),
        ("POST", "/generate", '{"prompt": ""}', 400, "at least one byte"),
        ("POST", "/generate", '{"prompt": "a", "max_tokens": "b"}', 400, "must be an integer"),
        ("POST", "/generate", '{"prompt": "a", "max_tokens": 99}', 400, "at most 48 in sum"),
    ]:
        _, response = ask(server[0], method, path, body)
        assert response.status == status
        assert message in json.loads(response.read())["error"]


def test_an_error_leaves_nothing_to_be_read_as_the_next_request(server) -> None:
    port = server[0].server_port
    smuggled = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"
    for path, length, status in [("/", len(smuggled), 404), ("/generate", -1, 400)]:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n"
            connection.sendall(head.encode() + smuggled)
            answer = connection.makefile("rb").read()  # to the end: the server hangs up
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert b"\r\nConnection: close\r\n" in answer
        assert answer.count(b"HTTP/1.1") == 1


def test_an_answer_reaches_who_still_sends(server) -> None:
    address = "127.0.0.1", server[0].server_port
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
        connection.recv(1, socket.MSG_PEEK)  # the answer is there before the body
        for _ in range(1000):
            connection.sendall(b"-" * 1000)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"POST /generate" in answer


def test_nobody_is_read_for_ever(server, monkeypatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_LINGER", 0.0)
    address = "127.0.0.1", server[0].server_port
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3000\r\n\r\n")
        assert b"POST /generate" in connection.makefile("rb").read()
        with pytest.raises(ConnectionError):
            connection.sendall(bytes(1 << 26))


def test_http_1_0_has_no_chunks(server, model, capsys) -> None:
    """As proxies speak it; and who hangs up in the middle of a request prints nothing."""
    body = b'{"prompt": "def f", "max_tokens": 5}'
    head = b"POST /generate HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
    address = "127.0.0.1", server[0].server_port
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(head[:-2])
        # Closed by a reset, with no wait for what is on its way.
        linger = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(head + body)
        answer = connection.makefile("rb").read()
    expected, _ = generate_greedily(model, b"def f", 5, padded_to=MAX_TOKENS)
    assert b"Transfer-Encoding" not in answer
    assert answer.partition(b"\r\n\r\n")[2] == expected
    assert "Traceback" not in capsys.readouterr().err


def test_a_worker_that_fails_lets_nobody_wait(server, monkeypatch) -> None:
    server, worker = server

    def fail(*arguments):
        raise RuntimeError("broken")

    monkeypatch.setattr(worker.scheduler.engine, "prefill", fail)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    body = json.dumps({"prompt": "def f", "max_tokens": 5})
    _, response = ask(server, "POST", "/generate", body)
    with pytest.raises(http.client.IncompleteRead):
        response.read()
    worker.join(10)
    _, response = ask(server, "POST", "/generate", body)
    assert response.status == 503
    assert "broken" in json.loads(response.read())["error"]
    for request in worker.scheduler.active:
        worker.scheduler.allocator.free(request.pages)


def test_who_hangs_up_is_dropped(server, monkeypatch) -> None:
    server, worker = server
    scheduler, step = worker.scheduler, worker.scheduler.step
    record = scheduler.telemetry.record_request
    has_hung_up, is_noticed, is_recorded = (threading.Event() for _ in range(3))

    class WatchedRequest(Request):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "is_cancelled" and value:
                is_noticed.set()

    def step_in_turn():
        if scheduler.telemetry.tokens:
            has_hung_up.wait(30)
        if scheduler.telemetry.tokens > 30:  # more than enough to write to a closed connection
            is_noticed.wait(30)
        step()

    monkeypatch.setattr(endpoint, "Request", WatchedRequest)
    monkeypatch.setattr(scheduler, "step", step_in_turn)
    monkeypatch.setattr(
        scheduler.telemetry, "record_request", lambda r: (record(r), is_recorded.set())
    )
    connection, response = ask(
        server, "POST", "/generate", json.dumps({"prompt": "a", "max_tokens": 47})
    )
    response.read(1)
    response.close()
    connection.close()
    has_hung_up.set()
    assert is_recorded.wait(60)
    (request,) = scheduler.telemetry.requests
    assert request.is_cancelled
    assert len(request.output) < 47


def test_a_saved_model_is_served_and_plotted(model, tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    loaded = load_model(path, jnp.float32, "xla")
    assert loaded.config == CONFIG
    for saved, again in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, loaded)), strict=True):
        np.testing.assert_array_equal(saved, again)
    options = {"model": path, "out": tmp_path, "load": 6, "max-tokens": MAX_TOKENS, "pages": 24}
    options |= {"max-batch": 2, "chunks": 8, "port": 0, "rate": 100, "dtype": "float32"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["serve.py", "--check", *words])
    assert serve.main() == 0
    printed = capsys.readouterr().out
    assert "6 requests in" in printed
    assert "Time to first token" in printed
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "serving.json").read_text())["requests"] == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--check"], "--check needs --load"),
        (["--check", "--load", "-1"], "--load must be at least 1"),
        (["--load", "0"], "--load must be at least 1"),
        (["--load", "5", "--rate", "0"], "--load needs a --rate above 0"),
        (["--load", "5", "--max-tokens", "11"], "--max-tokens of 12 or more"),
    ],
)
def test_a_check_of_nothing_is_refused(words, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", *words])
    with pytest.raises(SystemExit):
        serve.parse_arguments()
    assert message in capsys.readouterr().err


def test_a_failed_worker_fails_the_program(model, tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, model)

    def fail(self):
        raise RuntimeError("broken")

    def post_once(server):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(http.client.IncompleteRead):
            post("127.0.0.1", server.server_port, b"def f", 5)
        server.shutdown()

    monkeypatch.setattr(Scheduler, "step", fail)
    monkeypatch.setattr(Engine, "warm_up", lambda self: 0)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    monkeypatch.setattr(serve, "run_until_interrupted", post_once)
    words = ["--model", str(path), "--max-tokens", str(MAX_TOKENS), "--port", "0"]
    monkeypatch.setattr(sys, "argv", ["serve.py", *words])
    assert serve.main() == 1
    assert "broken" in capsys.readouterr().err


@pytest.mark.parametrize("chunk_sizes", [[0], [-4, 8], []])
def test_bad_chunk_sizes_are_refused(model, chunk_sizes) -> None:
    with pytest.raises(ValueError, match="chunk_sizes must be"):
        Engine(model, num_pages=4, page_size=4, max_tokens=8, max_batch=1, chunk_sizes=chunk_sizes)


def test_telemetry_keeps_the_latest(monkeypatch) -> None:
    monkeypatch.setattr(telemetry, "LATEST", 3)
    record = Telemetry(num_pages=1)
    requests = [Request(b"a", 1) for _ in range(5)]
    for request in requests:
        record.record_request(request)
        record.record_step(tokens=1, held_pages=0, kept_pages=0, active=1, waiting=0)
    assert list(record.requests) == requests[2:]
    assert len(record.steps) == 3
