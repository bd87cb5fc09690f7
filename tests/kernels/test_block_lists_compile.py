"""The Hopper kernels over lists and packed sequences, cross-compiled: what ptxas made of them."""

import numpy as np
import pytest

from jax_flashcute.ffi.resources import find_tools, report
from jax_flashcute.kernels import registry
from tests.kernels.test_forward_compiles import compile_key
from tests.simulator.test_block_lists import odd, random_lists
from tests.simulator.test_forward_segments import call_of

LENGTHS = (1, 300, 300)
IDS = np.zeros((1, 300), np.int32)
KINDS = {
    "boundaries": {"cu_seqlens_q": [0, 100, 300]},
    "ids": {"segment_ids": IDS},
    "positions": {"segment_ids": IDS, "positions": "segment"},
    "lists": {"block_mask": random_lists(LENGTHS, 1, 1)},
    "small_lists": {"block_mask": random_lists(LENGTHS, 1, 1, (64, 64))},
    "lists_in_turns": {"block_mask": random_lists(LENGTHS, 1, 1), "deterministic": True},
    "boundaries_in_turns": {"cu_seqlens_q": [0, 100, 300], "deterministic": True},
    "lists_and_mask": {"block_mask": random_lists(LENGTHS, 1, 1), "mask_mod": odd},
}
ALWAYS = [
    ("fwd", 64, "positions"),
    ("fwd", 128, "lists_and_mask"),
    ("bwd", 128, "positions"),
    ("bwd", 128, "lists_in_turns"),
]


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    try:
        find_tools()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("direction", "head_dim", "kind"),
    [
        pytest.param(*call, marks=[] if call in ALWAYS else pytest.mark.slow)
        for call in ((d, h, k) for d in ("fwd", "bwd") for h in (64, 128, 256) for k in KINDS)
    ],
)
def test_no_spills_and_no_products_in_a_row(direction, head_dim: int, kind: str) -> None:
    spec, operands = call_of(LENGTHS, head_dim=head_dim, is_causal=True, **KINDS[kind])
    key = registry.kernel_key(spec, operands, direction, "sm_90a", 132)
    kernel = compile_key(key)
    assert kernel.cubin is not None
    assert kernel.ptx is not None
    (found,) = (r for r in report(kernel.cubin) if r.count("HGMMA"))
    assert (found.spill_loads, found.spill_stores, found.stack_bytes) == (0, 0, 0)
    assert found.count("HGMMA") == kernel.ptx.count("wgmma.mma_async")
    assert found.count("WARPGROUP.DEPBAR") == kernel.ptx.count("wgmma.wait_group")
