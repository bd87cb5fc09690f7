"""State spaces, generic addresses, vectors, control flow and register reallocation.

Sections by their number in PTX ISA 9.0: 9.7.9 ld, st, cvta, isspacep; 9.7.12 control flow and
9.3 guards; 9.7.2 carries; 9.7.13 match, vote; 9.7.19 setmaxnreg; 10 special registers.
"""

import numpy as np
import pytest

from tests.simulator import SimulationError
from tests.simulator.snippets import evaluate, execute

STORE = """
  mul.wide.u32 %rd60, %tid, 4;
  add.s64 %rd60, %rd60, %a0;
  st.global.b32 [%rd60], %r0;
"""


def per_thread(body, *arrays, threads=32, **how):
    """Run ``body``, which leaves a word in %r0, and return it for every thread."""
    return execute(body + STORE, np.zeros(threads, np.uint32), *arrays, threads=threads, **how)[0]


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


def test_indirect_branches():
    """brx.idx: the target is chosen by an index into a list of labels."""
    got = per_thread(
        """
      rem.u32 %r1, %tid, 3;
      brx.idx %r1, targets;
    targets: .branchtargets zero, one, two;
    zero:
      mov.u32 %r0, 10;
      bra join;
    one:
      mov.u32 %r0, 11;
      bra join;
    two:
      mov.u32 %r0, 12;
    join:
    """,
        threads=64,
    )
    np.testing.assert_array_equal(got, 10 + np.arange(64) % 3)


def test_guards():
    got = per_thread("""
      mov.u32 %r0, 1;
      setp.lt.u32 %p1, %tid, 10;
      @%p1 add.u32 %r0, %r0, 100;
      @!%p1 add.u32 %r0, %r0, 200;
    """)
    np.testing.assert_array_equal(got, np.where(np.arange(32) < 10, 101, 201))


def test_threads_that_return_early():
    got = execute("""
      mul.wide.u32 %rd1, %tid, 4;
      add.s64 %rd1, %rd1, %a0;
      and.b32 %r1, %tid, 1;
      setp.eq.u32 %p1, %r1, 0;
      @%p1 ret;
      activemask.b32 %r2;
      st.global.b32 [%rd1], %r2;
    """, np.zeros(32, np.uint32))[0]  # fmt: skip
    np.testing.assert_array_equal(got, np.where(np.arange(32) % 2, 0xAAAAAAAA, 0))


def test_special_registers():
    got = per_thread(
        """
      mov.u32 %r1, %laneid;
      mov.u32 %r2, %warpid;
      mov.u32 %r3, %ntid.x;
      mad.lo.u32 %r0, %r2, 1000, %r1;
      mad.lo.u32 %r0, %r3, 10000, %r0;
    """,
        threads=64,
    )
    n = np.arange(64)
    np.testing.assert_array_equal(got, 640000 + n // 32 * 1000 + n % 32)


def test_carry_chain():
    """add.cc / addc: 64-bit addition from 32-bit halves."""
    a = np.array([0xFFFFFFFF, 1, 0x80000000], np.uint32)
    got = evaluate("add.cc.u32 d, a, b", a, a, out=np.uint32)
    np.testing.assert_array_equal(got, a + a)
    carries = per_thread("""
      mov.u32 %r1, 0xFFFFFFFF;
      add.cc.u32 %r2, %r1, %tid;
      addc.u32 %r0, 0, 0;
    """)
    np.testing.assert_array_equal(carries, np.arange(32) > 0)


def test_match_and_masked_votes():
    got = per_thread("""
      and.b32 %r1, %tid, 3;
      match.any.sync.b32 %r0, %r1, -1;
    """)
    np.testing.assert_array_equal(got, 0x11111111 << (np.arange(32) % 4))


REALLOCATE = """
  setp.lt.u32 %p1, %tid, 128;
  @%p1 bra producer;
  setmaxnreg.inc.sync.aligned.u32 {more};
  bra done;
producer:
  setmaxnreg.dec.sync.aligned.u32 24;
done:
  mov.u32 %r0, 7;
"""


@pytest.mark.parametrize("warps", ["fair", "adversarial", "seeded"])
def test_registers_come_from_those_given_back(warps):
    """setmaxnreg.inc: "blocks until enough registers are available in the per-CTA pool"."""
    got = per_thread(REALLOCATE.format(more=240), threads=384, warps=warps, seed=1)
    assert (got == 7).all()


def test_more_registers_than_there_are_is_a_deadlock():
    with pytest.raises(SimulationError) as raised:
        per_thread(REALLOCATE.format(more=256), threads=384)
    assert raised.value.findings[0].kind == "deadlock"
    assert "registers of the block's pool" in str(raised.value)


def test_misaligned_and_overlong_global_accesses():
    for offset, kind in ((2, "misaligned access"), (128, "out-of-bounds access")):
        with pytest.raises(SimulationError) as raised:
            per_thread(f"add.s64 %rd1, %a0, {offset}; ld.global.b32 %r0, [%rd1];")
        assert raised.value.findings[0].kind == kind
