"""Moves and generic addresses, against PTX ISA 9.0, 9.7.9 "mov", "cvta" and "isspacep"."""

import numpy as np

from tests.simulator.operands import OTHERS, WORDS
from tests.simulator.snippets import evaluate, per_thread


def test_moves_pack_and_unpack():
    """mov.b64 d, {a, b}: a is the least significant part."""
    got = evaluate("mov.b64 d, {a, b}", WORDS, OTHERS, out=np.uint64)
    expected = OTHERS.astype(np.uint64) << np.uint64(32) | WORDS
    np.testing.assert_array_equal(got, expected)


def test_generic_addresses_reach_shared_memory():
    """cvta: from a state space to the generic one and back; isspacep."""
    got = per_thread("""
      mov.u32 %r1, smem;
      cvt.u64.u32 %rd1, %r1;
      cvta.shared.u64 %rd2, %rd1;
      mul.wide.u32 %rd3, %tid, 4;
      add.s64 %rd4, %rd2, %rd3;
      add.u32 %r2, %tid, 5;
      st.b32 [%rd4], %r2;
      cvta.to.shared.u64 %rd5, %rd4;
      cvt.u32.u64 %r3, %rd5;
      ld.shared.b32 %r4, [%r3];
      isspacep.shared %p1, %rd4;
      isspacep.global %p2, %a0;
      selp.b32 %r5, 100, 0, %p1;
      selp.b32 %r6, 200, 0, %p2;
      add.u32 %r0, %r4, %r5;
      add.u32 %r0, %r0, %r6;
    """)
    np.testing.assert_array_equal(got, np.arange(32) + 305)
