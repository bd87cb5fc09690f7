"""Which requests compute what next: continuous batching, first come, first served.

Every step runs one chunk of one prompt, so that long prompts hold nobody up for long, and then one
token of every request whose prompt is done.  Requests join and leave between steps.

Pages are allocated as sequences grow.  When they run out, pages kept for prefixes go first, and
then the youngest request: its pages are freed, it waits at the head of the queue with all the text
that it has, and computes its keys and values again later.  The oldest request can therefore always
go on, and no text is lost.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from jax_flashcute import OutOfPagesError
from serving.engine import Engine
from serving.prefixes import PrefixIndex
from serving.telemetry import Telemetry


@dataclass(eq=False)
class Request:
    """A prompt and the text that follows it so far."""

    prompt: bytes
    max_new_tokens: int
    on_token: Callable[[int], None] = lambda token: None
    on_end: Callable[[], None] = lambda: None
    arrived: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    ended: float | None = None
    preemptions: int = 0
    shared_tokens: int = 0  # found in the prefix index, not computed
    is_cancelled: bool = False
    tokens: list[int] = field(init=False)
    pages: list[int] = field(default_factory=list, init=False)
    length: int = field(default=0, init=False)  # tokens whose keys and values are in the pages

    def __post_init__(self):
        self.tokens = list(self.prompt)

    @property
    def output(self) -> bytes:
        return bytes(self.tokens[len(self.prompt) :])

    @property
    def pending(self) -> int:
        """Tokens to compute: one while decoding, more while the prompt is being read."""
        return len(self.tokens) - self.length


class Scheduler:
    """Requests that wait, requests that run, and the engine's pages shared among them."""

    def __init__(self, engine: Engine, telemetry: Telemetry | None = None):
        self.engine = engine
        self.allocator = engine.allocator
        self.prefixes = PrefixIndex(engine.allocator)
        self.telemetry = telemetry or Telemetry(engine.allocator.num_pages)
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []  # the oldest first, all older than those that wait

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that could never end."""
        total = len(request.prompt) + request.max_new_tokens
        if not request.prompt:
            raise ValueError("prompt must have at least one byte; got none")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1; got {request.max_new_tokens}")
        if total > self.engine.max_tokens:
            raise ValueError(
                f"prompt and max_tokens must be at most {self.engine.max_tokens} in sum; "
                f"got {total}"
            )
        if self.allocator.pages_for(total) > self.allocator.num_pages:
            raise ValueError(
                f"prompt and max_tokens must fit into {self.allocator.num_pages} pages of "
                f"{self.allocator.page_size}; got {total}"
            )

    def submit(self, request: Request) -> None:
        """Queue a request; ValueError where it could never end."""
        self.check(request)
        self.waiting.append(request)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.active

    def step(self) -> None:
        """One chunk of a prompt, if there is one, and one token of every other request."""
        self._drop_cancelled()
        self._admit()
        before = self.telemetry.tokens
        for request in [r for r in self.active if r.pending > 1][:1]:
            count = min(request.pending, self.engine.chunk_sizes[-1])
            if self._make_room(request, request.length + count):
                self._prefill(request, count)
        # The oldest first: whoever lacks room takes it from the youngest, never from these.
        decoding = [
            request
            for request in list(self.active)
            if request.pending == 1 and self._make_room(request, request.length + 1)
        ]
        if decoding:
            self._decode(decoding)
        held = {page for request in self.active for page in request.pages}
        self.telemetry.record_step(
            tokens=self.telemetry.tokens - before,
            held_pages=len(held),
            kept_pages=self.allocator.num_pages - self.allocator.num_free - len(held),
            active=len(self.active),
            waiting=len(self.waiting),
        )

    def _admit(self) -> None:
        """Begin the next request once the prompts before it are read and its pages are there."""
        while self.waiting and len(self.active) < self.engine.max_batch:
            request = self.waiting[0]
            if any(other.pending > 1 for other in self.active):
                return
            needed = self.allocator.pages_for(len(request.tokens) + 1)
            if self.active and needed > self.allocator.num_free + self.prefixes.idle:
                return
            self.waiting.popleft()
            request.pages = self.prefixes.find(request.tokens)
            request.length = len(request.pages) * self.allocator.page_size
            request.shared_tokens += request.length
            self.active.append(request)

    def _prefill(self, request: Request, count: int) -> None:
        chunk = request.tokens[request.length : request.length + count]
        following = self.engine.prefill(chunk, request.pages, request.length)
        self._advance(request, count)
        if not request.pending:
            self._extend(request, following)

    def _decode(self, requests: list[Request]) -> None:
        following = self.engine.decode(
            [request.tokens[-1] for request in requests],
            [request.pages for request in requests],
            [request.length for request in requests],
        )
        for request, token in zip(requests, following, strict=True):
            self._advance(request, 1)
            self._extend(request, token)

    def _advance(self, request: Request, count: int) -> None:
        full_before = request.length // self.allocator.page_size
        request.length += count
        full = request.length // self.allocator.page_size
        if full > full_before:
            self.prefixes.add(request.tokens[: full * self.allocator.page_size], request.pages)

    def _extend(self, request: Request, token: int) -> None:
        if request.first_token is None:
            request.first_token = time.perf_counter()
        request.tokens.append(token)
        self.telemetry.tokens += 1
        request.on_token(token)
        if len(request.output) == request.max_new_tokens:
            self._end(request)

    def _end(self, request: Request) -> None:
        self.active.remove(request)
        self.allocator.free(request.pages)
        request.pages = []
        request.ended = time.perf_counter()
        self.telemetry.record_request(request)
        request.on_end()

    def _make_room(self, request: Request, tokens: int) -> bool:
        """Pages for so many tokens of a request; False where it had to give up its own."""
        while request in self.active:
            try:
                self.allocator.grow(request.pages, tokens)
                return True
            except OutOfPagesError as error:
                if not self.prefixes.evict(error.needed - error.free):
                    self._preempt(self.active[-1])
        return False

    def _preempt(self, request: Request) -> None:
        self.active.remove(request)
        self.allocator.free(request.pages)
        request.pages, request.length = [], 0
        request.preemptions += 1
        self.waiting.appendleft(request)

    def _drop_cancelled(self) -> None:
        for request in [r for r in self.active if r.is_cancelled]:
            self._end(request)
        self.waiting = deque(r for r in self.waiting if not r.is_cancelled)
