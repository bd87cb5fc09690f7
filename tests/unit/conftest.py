"""Unit tests run on the CPU, on a machine with a GPU too, so that they mean the same everywhere."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with jax.default_device(jax.devices("cpu")[0]):
        yield
