"""The forward on pages, cross-compiled for sm_90a and sm_100a: no spills, the right copies."""

import jax
import jax.numpy as jnp
import pytest

from jax_flashcute.ffi.resources import find_tools, report
from jax_flashcute.kernels import description, registry
from jax_flashcute.spec import AttentionSpec, Operands
from tests.kernels.test_forward_compiles import compile_key, main_report

# (architecture, page_size, head_dim, value head_dim, queries, group)
ALWAYS = [
    ("sm_90a", 1, 192, 128, 2048, 1),
    ("sm_90a", 4, 128, 128, 1, 8),
    ("sm_90a", 4, 64, 64, 2048, 1),
    ("sm_90a", 1, 128, 128, 2048, 4),
    ("sm_100a", 8, 128, 128, 2048, 1),
    ("sm_100a", 1, 128, 128, 1, 8),
]
HEAD_DIMS = ((8, 8), (64, 64), (72, 40), (96, 96), (128, 128), (192, 128), (256, 256), (64, 256))
ALL = [
    (arch, page_size, *dims, *rows)
    for arch in ("sm_90a", "sm_100a")
    for page_size in (1, 2, 4, 8, 16, 128, 512)
    for dims in HEAD_DIMS
    for rows in ((2048, 1), (1, 7), (2048, 4))
    if rows != (2048, 4) or (arch == "sm_90a" and page_size < 8)
]


def operands(page_size: int, head_dim: int, head_dim_v: int, queries: int, group: int) -> Operands:
    batch, kv_heads, tokens = 8, 2, 8192
    integers = jax.ShapeDtypeStruct((batch,), jnp.int32)
    pages = (batch * tokens // page_size, page_size, kv_heads)
    query = (batch, queries, kv_heads * group, head_dim)
    return Operands(
        query=jax.ShapeDtypeStruct(query, jnp.bfloat16),
        key=jax.ShapeDtypeStruct((*pages, head_dim), jnp.bfloat16),
        value=jax.ShapeDtypeStruct((*pages, head_dim_v), jnp.bfloat16),
        q_offset=integers,
        query_seq_lengths=None if group == 4 else integers,
        key_value_seq_lengths=integers,
        page_table=jax.ShapeDtypeStruct((batch, tokens // page_size), jnp.int32),
    )


@pytest.mark.parametrize(
    "call",
    [
        *(pytest.param(c, id="-".join(map(str, c))) for c in ALWAYS),
        *(
            pytest.param(c, id="-".join(map(str, c)), marks=pytest.mark.slow)
            for c in ALL
            if c not in ALWAYS
        ),
    ],
)
def test_code(call: tuple[str, int, int, int, int, int]) -> None:
    try:
        find_tools()
    except ImportError as error:
        pytest.skip(str(error))
    arch, page_size, head_dim, head_dim_v, queries, group = call
    spec = AttentionSpec(0.125, is_causal=True)
    paged = operands(page_size, head_dim, head_dim_v, queries, group)
    key = registry.kernel_key(spec, paged, "fwd", arch, 132)
    assert key.split_kv == (queries == 1)
    kernel = compile_key(key)
    assert kernel.cubin is not None
    assert kernel.ptx is not None
    for each in report(kernel.cubin):
        assert (each.spill_loads, each.spill_stores) == (0, 0)
        assert (each.stack_bytes, each.local_bytes) == (0, 0)
    found = main_report(kernel)
    assert found.count("HGMMA") == kernel.ptx.count("wgmma.mma_async")
    assert found.count("UTCHMMA") == kernel.ptx.count("tcgen05.mma.")
    assert found.count("WARPGROUP.DEPBAR") == kernel.ptx.count("wgmma.wait_group")
    assert ("gathered" in str(description.page_copies(key))) == (group == 4)
    by_threads = description.page_copies(key) == "asynchronous copies"
    assert (found.count("LDGSTS") > 0) == by_threads
    if by_threads:
        assert page_size < 8
