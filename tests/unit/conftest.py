"""Unit tests run on the CPU, on a machine with a GPU too, so that they mean the same everywhere."""

from collections.abc import Iterator

import jax
import pytest
from hypothesis import HealthCheck, settings

# Whether a run passes depends on the code alone: neither on how busy the machine is nor on luck.
settings.register_profile(
    "unit", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unit")


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with jax.default_device(jax.devices("cpu")[0]):
        yield
