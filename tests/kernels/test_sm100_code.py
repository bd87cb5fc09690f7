"""Every Blackwell configuration: what its launcher takes, and what ptxas made of it."""

import pytest

from jax_flashcute.kernels import registry
from tests.kernels import sm100_code
from tests.kernels.sm100_code import CLASSES

ALL = list(sm100_code.configurations())


@pytest.mark.parametrize("dims", CLASSES, ids=str)
def test_launchers_take_what_calls_pass(dims: tuple[int, int]) -> None:
    for configuration in ALL:
        if (configuration.head_dims, configuration.arch) == (dims, "sm_100a"):
            key = configuration.key()
            taken = [len(a[1]) for a in registry.arrays_of(key) if a is not None]
            passed = sm100_code.buffers(key, *configuration.call())
            assert [len(shape) for _, shape in passed] == taken, configuration
