"""Every Blackwell configuration: what its launcher takes, and what ptxas made of it.

No GPU is needed, and none has run these kernels.
"""

import json

import pytest

from jax_flashcute.ffi.resources import find_tools
from jax_flashcute.kernels import registry
from tests.kernels import sm100_code
from tests.kernels.sm100_code import CLASSES

ALL = {str(c): c for c in sm100_code.configurations()}


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads(sm100_code.RECORD.read_text())


@pytest.mark.parametrize("dims", CLASSES, ids=str)
def test_launchers_take_what_calls_pass(dims: tuple[int, int]) -> None:
    for configuration in ALL.values():
        if (configuration.head_dims, configuration.arch) == (dims, "sm_100a"):
            key = configuration.key()
            taken = [len(a[1]) for a in registry.arrays_of(key) if a is not None]
            passed = sm100_code.buffers(key, *configuration.call())
            assert [len(shape) for _, shape in passed] == taken, configuration


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_code(name: str, record: dict) -> None:
    """Instructions, registers, shared memory; and what is spilled is what is recorded."""
    try:
        find_tools()
    except ImportError as error:
        pytest.skip(str(error))
    found = sm100_code.measured(ALL[name])
    recorded = record["configurations"].get(name)
    if recorded is not None and record["compiler"] == sm100_code.compiler():
        assert found == recorded
    assert may_spill(name) or found["spilled_in_loops"] == 0


def test_the_page_is_what_is_recorded(record: dict) -> None:
    assert set(record["configurations"]) <= set(ALL)
    assert sm100_code.PAGE.read_text() == sm100_code.page(record)


def test_no_loop_of_the_forward_or_of_a_dense_backward_spills(record: dict) -> None:
    for name, row in record["configurations"].items():
        assert may_spill(name) or row["spilled_in_loops"] == 0, (name, row)


def may_spill(name: str) -> bool:
    feature = ALL[name].feature.removesuffix(", deterministic")
    return ALL[name].direction == "bwd" and feature in sm100_code.ELEMENTS
