"""Every Blackwell configuration: what its launcher takes, and what ptxas made of it.

No GPU is needed, and none has run these kernels.
"""

import json
from pathlib import Path

import pytest

from benchmarks import sass_model
from jax_flashcute.ffi.resources import find_tools
from jax_flashcute.kernels import registry
from tests.kernels import sm100_code
from tests.kernels.sm100_code import CLASSES

ALL = {str(c): c for c in sm100_code.configurations()}
QUICK = [
    "fwd 128/128 sm_103a causal",
    "fwd 128/128 sm_100a decode",
    "fwd 72/40 sm_100a window",
    "fwd 192/128 sm_100a window",
    "fwd 256/256 sm_100a window",
    "fwd 128/128 sm_100a relative bias",
    "fwd 128/128 sm_100a union",
    "bwd 64/64 sm_100a soft cap",
]


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


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in ALL if n not in QUICK)]
)
def test_code(name: str, record: dict) -> None:
    """Instructions, registers, shared memory; and what is spilled is what is recorded."""
    needs_tools()
    found = sm100_code.measured(ALL[name])
    if record["compiler"] == sm100_code.compiler():
        assert found == record["configurations"][name]


def test_configurations_are_recorded(record: dict) -> None:
    assert set(QUICK) <= set(record["configurations"]) <= set(ALL)
    assert sm100_code.PAGE.read_text() == sm100_code.page(record)


def test_no_loop_of_the_forward_or_of_a_dense_backward_spills(record: dict) -> None:
    for name, row in record["configurations"].items():
        may_spill = name.startswith("bwd") and ALL[name].feature in sm100_code.ELEMENTS
        assert may_spill or row["spilled_in_loops"] == 0, (name, row)


def test_products_bound_the_main_loop() -> None:
    """By the model's count: shared memory has no time for more than products and their tiles."""
    needs_tools()
    kernel = sass_model.KERNELS[0]
    assert (kernel.name, kernel.implementation) == ("forward, full", "jax_flashcute")
    (code,) = sass_model.kernels_of(kernel.compile(Path()))
    found = sass_model.row(kernel, code)
    assert max(found[name] for name in sass_model.CYCLES) == found["products"]
    assert found["spills"] == 0


def needs_tools() -> None:
    try:
        find_tools()
    except ImportError as error:
        pytest.skip(str(error))
