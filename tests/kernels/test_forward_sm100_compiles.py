"""Every Blackwell forward configuration, cross-compiled: what ptxas made of it.

No GPU is needed, and none has run these kernels.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import sass_model
from jax_flashcute.ffi.compile import ArrayType, compile_kernel
from jax_flashcute.ffi.resources import find_tools, report
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.config.sm100 import FwdConfigSm100
from jax_flashcute.kernels.key import KernelKey
from jax_flashcute.spec import AttentionSpec, Operands
from tests.cases import Case
from tests.simulator.test_block_lists import random_lists
from tests.simulator.test_forward_elements import operands_of
from tests.simulator.test_forward_features import FIRST_KEYS
from tests.simulator.test_forward_segments import call_of
from tests.user_functions import MASKS, SCORES

SPECS = {
    "full": AttentionSpec(0.125),
    "causal": AttentionSpec(0.125, is_causal=True),
    "window": AttentionSpec(0.125, local_window_size=(300, 20)),
    "decode": AttentionSpec(0.125, is_causal=True),
}
HEAD_DIMS = [
    *((8, 8), (64, 64), (72, 40), (96, 96), (128, 128), (192, 128), (192, 192)),
    *((256, 256), (64, 256), (256, 128)),
]
ALWAYS = [
    *((h, hv, "window", "sm_100a") for h, hv in ((128, 128), (72, 40), (192, 128), (256, 256))),
    (128, 128, "full", "sm_100a"),
    (128, 128, "causal", "sm_103a"),
    (128, 128, "decode", "sm_100a"),
]
ALL = [
    (h, hv, mask, arch)
    for h, hv in HEAD_DIMS
    for mask in SPECS
    for arch in ("sm_100a", "sm_103a")
    if (h, hv, mask, arch) not in ALWAYS
]


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    try:
        find_tools()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "mask", "arch"),
    [*ALWAYS, *(pytest.param(*call, marks=pytest.mark.slow) for call in ALL)],
)
def test_code(head_dim: int, head_dim_v: int, mask: str, arch: str) -> None:
    lengths = None if mask == "full" else jax.ShapeDtypeStruct((2,), jnp.int32)
    operands = Operands(
        query=jax.ShapeDtypeStruct((2, 1 if mask == "decode" else 3000, 4, head_dim), jnp.bfloat16),
        key=jax.ShapeDtypeStruct((2, 3000, 2, head_dim), jnp.bfloat16),
        value=jax.ShapeDtypeStruct((2, 3000, 2, head_dim_v), jnp.bfloat16),
        q_offset=lengths,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
    )
    key = check_code(SPECS[mask], operands, arch)
    assert key.split_kv == (mask == "decode")


ELEMENTS = {
    "functions": (("documents", "relative_bias"), {"group": 2}),
    "operands": ((None, None), {"soft_cap": 2.0, "bias": "bnts", "mask": "bnts", "sinks": True}),
    "alibi": ((None, "alibi"), {}),
}
ALWAYS_BY_ELEMENT = [("functions", 128, "sm_100a")]
ALL_BY_ELEMENT = [
    (name, head_dim, arch)
    for name in ELEMENTS
    for head_dim in (64, 128, 256)
    for arch in ("sm_100a", "sm_103a")
    if (name, head_dim, arch) not in ALWAYS_BY_ELEMENT
]


@pytest.mark.parametrize(
    ("name", "head_dim", "arch"),
    [*ALWAYS_BY_ELEMENT, *(pytest.param(*c, marks=pytest.mark.slow) for c in ALL_BY_ELEMENT)],
)
def test_code_of_elements(name: str, head_dim: int, arch: str) -> None:
    (mask, score), features = ELEMENTS[name]
    case = Case(2, 300, 300, 1, head_dim=head_dim, head_dim_v=head_dim, causal=True, **features)
    functions = (table[f](case) if f else None for table, f in ((MASKS, mask), (SCORES, score)))
    check_code(*operands_of(case, "bfloat16", *functions), arch)


IN_ARRAYS = {
    "segments": ({"segment_ids": np.arange(300)[None] // 70, "is_causal": True}, 8),
    "lists": ({"block_mask": random_lists((1, 300, 300), 1, 1, tile=(256, 128))}, 0),
    "union": ({"mask_mod": FIRST_KEYS, "q_offset": 5}, 8),
    "bits": ({"packed_mask": np.zeros((1, 1, 300, 10), np.uint32)}, 0),
}
"""Calls, and the bytes a thread that ptxas spills of them at head_dim 128.

They are the correction's, read and written once for each tile of work."""


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_ARRAYS)
@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
def test_code_of_masks_in_arrays(name: str, arch: str) -> None:
    arguments, spilled = IN_ARRAYS[name]
    check_code(*call_of((1, 300, 300), head_dim=128, **arguments), arch, spilled)


def test_products_bound_the_main_loop() -> None:
    """By the model's count: shared memory has no time for more than products and their tiles."""
    kernel = sass_model.KERNELS[0]
    assert (kernel.name, kernel.implementation) == ("forward, full", "jax_flashcute")
    (code,) = sass_model.kernels_of(kernel.compile(Path()))
    found = sass_model.row(kernel, code)
    assert max(found[name] for name in sass_model.CYCLES) == found["products"]
    assert found["spills"] == 0


def check_code(spec: AttentionSpec, operands: Operands, arch: str, allowed: int = 0) -> KernelKey:
    """``allowed``: bytes a thread that may be spilled."""
    key = registry.kernel_key(spec, operands, "fwd", arch, 148)
    arrays = [None if a is None else ArrayType(*a) for a in registry.arrays_of(key)]
    kernel = compile_kernel(registry.builder(key), arrays, arch, keep_intermediates=True)
    assert kernel.cubin is not None
    assert kernel.ptx is not None
    (found,) = (r for r in report(kernel.cubin) if r.count("UTCHMMA"))
    config = key.config
    assert isinstance(config, FwdConfigSm100)
    assert set(found.reallocated_registers) == {
        config.softmax_registers,
        config.correction_registers,
        config.other_registers,
    }
    assert found.highest_register < config.softmax_registers
    assert config.threads * found.registers <= 65536
    assert found.stack_bytes + found.local_bytes <= allowed
    if allowed:
        (code,) = sass_model.kernels_of(kernel.cubin)
        for body in sass_model.loops_over_tiles(code):
            assert sass_model.count(body, "LDL", "STL") == 0
    else:
        assert (found.spill_loads, found.spill_stores) == (0, 0)
    # A product in the code for each that was written; tensor memory read and written; Q, K and V
    # by TMA; rows of O 16 bytes at a time; mask bits eight at once; arithmetic in pairs.
    assert found.count("UTCHMMA") == kernel.ptx.count("tcgen05.mma.")
    assert found.count("LDTM") >= 3
    assert found.count("STTM") >= 2
    assert found.count("UTMALDG") >= 3
    assert found.count("STG.E.128") > 0
    assert found.count("R2P") >= config.tile_n // 8
    assert found.count("FFMA2") >= config.tile_n // 2
    return key
