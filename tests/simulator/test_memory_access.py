"""Loads, stores, atomics and matrix loads and stores.

Sections by their number in PTX ISA 9.0: 9.7.9 ld, st; 9.7.13 atom, red; 9.7.14 ldmatrix, stmatrix.
"""

import numpy as np
import pytest

from tests.simulator import SimulationError
from tests.simulator.snippets import execute, per_thread


def test_narrow_loads_extend():
    """ld: "sign-extended for signed types, zero-extended otherwise"."""
    source = np.array([-1, -128, 127, 0] * 8, np.int8)
    for kind, expected in (("s8", source), ("u8", source.view(np.uint8))):
        got = per_thread(
            f"cvt.u64.u32 %rd1, %tid; add.s64 %rd1, %rd1, %a1; ld.global.{kind} %r0, [%rd1];",
            source,
        )
        np.testing.assert_array_equal(got.view(np.int32), expected.astype(np.int32))


def test_vector_loads_and_stores():
    source = np.arange(128, dtype=np.uint32)
    got = execute("""
      mul.wide.u32 %rd1, %tid, 16;
      add.s64 %rd2, %rd1, %a1;
      add.s64 %rd3, %rd1, %a0;
      ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd2];
      st.global.v2.b32 [%rd3], {%r4, %r3};
      st.global.v2.b32 [%rd3+8], {%r2, %r1};
    """, np.zeros(128, np.uint32), source)[0]  # fmt: skip
    np.testing.assert_array_equal(got.reshape(32, 4), source.reshape(32, 4)[:, ::-1])


def test_local_memory_is_each_threads_own():
    got = per_thread("""
      .local .align 4 .b8 depot[16];
      mov.b32 %r1, depot;
      st.local.b32 [%r1+4], %tid;
      mul.lo.u32 %r2, %tid, 3;
      st.local.b32 [%r1+8], %r2;
      ld.local.b32 %r3, [%r1+4];
      ld.local.b32 %r4, [%r1+8];
      add.u32 %r0, %r3, %r4;
    """, threads=64)  # fmt: skip
    np.testing.assert_array_equal(got, 4 * np.arange(64))


def test_misaligned_and_overlong_global_accesses():
    for offset, kind in ((2, "misaligned access"), (128, "out-of-bounds access")):
        with pytest.raises(SimulationError) as raised:
            per_thread(f"add.s64 %rd1, %a0, {offset}; ld.global.b32 %r0, [%rd1];")
        assert raised.value.findings[0].kind == kind


def test_atomics():
    old, counter = execute(
        """
      atom.global.add.u32 %r0, [%a1], 2;
      mul.wide.u32 %rd60, %tid, 4;
      add.s64 %rd60, %rd60, %a0;
      st.global.b32 [%rd60], %r0;
    """,
        np.zeros(32, np.uint32),
        np.zeros(1, np.uint32),
    )
    assert sorted(old) == list(range(0, 64, 2))
    assert counter == [64]


def test_float_reductions():
    (total,) = execute(
        """
      cvt.rn.f32.u32 %r1, %tid;
      red.global.add.f32 [%a0], %r1;
    """,
        np.zeros(1, np.float32),
    )
    assert total == [496]


def test_compare_and_swap():
    (cell,) = execute(
        """
      add.u32 %r2, %tid, 1;
      atom.global.cas.b32 %r0, [%a0], %tid, %r2;
    """,
        np.zeros(1, np.uint32),
    )
    assert cell == [32]


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_fragments(transposed):
    """ldmatrix: thread i holds row i / 4, elements 2 (i % 4) and the next, of each matrix."""
    trans = ".trans" if transposed else ""
    body = f"""
      mov.u32 %r1, smem;
      shl.b32 %r2, %tid, 4;
      add.u32 %r3, %r1, %r2;
      cvt.u64.u32 %rd1, %r2;
      add.s64 %rd1, %rd1, %a1;
      ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd1];
      st.shared.v4.b32 [%r3], {{%r10, %r11, %r12, %r13}};
      bar.warp.sync -1;
      ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r3];
      cvt.u64.u32 %rd1, %r2;
      add.s64 %rd1, %rd1, %a0;
      st.global.v4.b32 [%rd1], {{%r20, %r21, %r22, %r23}};
      stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3+512], {{%r20, %r21, %r22, %r23}};
      bar.warp.sync -1;
      ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r3+512];
      cvt.u64.u32 %rd1, %r2;
      add.s64 %rd1, %rd1, %a2;
      st.global.v4.b32 [%rd1], {{%r10, %r11, %r12, %r13}};
    """
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    fragment = np.zeros((32, 4), np.uint32)
    got, _, back = execute(body, fragment, matrices, np.zeros_like(matrices))
    expected = matrices.swapaxes(1, 2) if transposed else matrices
    pairs = np.ascontiguousarray(expected).view(np.uint32).reshape(4, 32).T
    np.testing.assert_array_equal(got, pairs)
    np.testing.assert_array_equal(back, matrices)
