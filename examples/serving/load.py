"""Random requests that share prefixes, sent over HTTP as they would come: a trial of the server."""

import http.client
import json
import threading
import time
from dataclasses import dataclass

import numpy as np


@dataclass
class Trial:
    """One request of the load and what came back."""

    prompt: bytes
    max_new_tokens: int
    wait: float  # seconds after the one before it
    output: bytes = b""


def draw_trials(
    text: bytes, count: int, *, max_tokens: int, requests_per_second: float, seed: int
) -> list[Trial]:
    """Prompts cut from a text: one of four beginnings, then some of each prompt's own.

    Arrivals are a Poisson process.
    """
    rng = np.random.default_rng(seed)
    text = bytes(byte if byte < 128 else ord("?") for byte in text)
    third = max_tokens // 3

    def cut(length: int) -> bytes:
        start = int(rng.integers(0, len(text) - length))
        return text[start : start + length]

    beginnings = [cut(third) for _ in range(4)]
    return [
        Trial(
            prompt=beginnings[rng.integers(4)] + cut(int(rng.integers(1, third))),
            max_new_tokens=int(rng.integers(third // 4, third)),
            wait=float(rng.exponential(1 / requests_per_second)),
        )
        for _ in range(count)
    ]


def send(trials: list[Trial], host: str, port: int) -> None:
    """Send all, each after its wait, and fill in the outputs; raises where one went wrong."""
    errors: list[Exception] = []

    def run(trial: Trial) -> None:
        try:
            trial.output = post(host, port, trial.prompt, trial.max_new_tokens)
        except Exception as error:
            errors.append(error)

    threads = []
    for trial in trials:
        time.sleep(trial.wait)
        threads.append(threading.Thread(target=run, args=[trial], daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def post(host: str, port: int, prompt: bytes, max_new_tokens: int) -> bytes:
    """One request, its answer read to the end."""
    connection = http.client.HTTPConnection(host, port)
    body = json.dumps({"prompt": prompt.decode(), "max_tokens": max_new_tokens})
    connection.request("POST", "/generate", body)
    response = connection.getresponse()
    output = response.read()
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {output.decode()}")
    return output
