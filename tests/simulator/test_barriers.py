"""Barriers, mbarriers and register reallocation: PTX ISA 9.0, 9.7.13, 9.7.19 and 8."""

import numpy as np
import pytest

from tests.simulator import SimulationError
from tests.simulator.snippets import LANES, MBARRIER, findings, per_thread

# ---- 9.7.13 bar, barrier

EXCHANGE = """
  mov.u32 %r1, smem;
  shl.b32 %r2, %tid, 2;
  add.u32 %r3, %r1, %r2;
  st.shared.b32 [%r3], %tid;
  {barrier}
  xor.b32 %r4, %r2, 128;
  add.u32 %r4, %r1, %r4;
  ld.shared.b32 %r0, [%r4];
"""


def test_barrier_orders_shared_memory():
    got = per_thread(EXCHANGE.format(barrier="bar.sync 0;"), threads=64)
    np.testing.assert_array_equal(got, np.arange(64) ^ 32)


def test_without_a_barrier_there_is_a_race():
    body = EXCHANGE.format(barrier="") + "st.global.b32 [%a0], %r0;"
    for how in ({}, {"warps": "adversarial", "seed": 1}, {"warps": "seeded", "seed": 1}):
        kinds = findings(body, np.zeros(1, np.uint32), threads=64, **how)
        assert {"shared-memory race", "uninitialised shared memory"} & set(kinds)


def test_arrive_and_sync_pair_up():
    """bar.arrive does not wait; bar.sync on the same barrier waits for both counts."""
    got = per_thread("""
      mov.u32 %r1, smem;
      setp.ge.u32 %p1, %tid, 32;
      @%p1 bra consumer;
      st.shared.b32 [%r1], 42;
      bar.arrive 3, 64;
      mov.u32 %r0, 1;
      bra done;
    consumer:
      bar.sync 3, 64;
      ld.shared.b32 %r0, [%r1];
    done:
    """.replace("st.shared.b32 [%r1], 42;", "mov.u32 %r5, 42;\n @!%p1 st.shared.b32 [%r1], %r5;"),
        threads=64)  # fmt: skip
    np.testing.assert_array_equal(got, [1] * 32 + [42] * 32)


def test_barrier_reduction():
    got = per_thread(
        """
      setp.lt.u32 %p1, %tid, 10;
      bar.red.popc.u32 %r0, 0, %p1;
    """,
        threads=64,
    )
    assert (got == 10).all()


# ---- 9.7.13 mbarrier


def test_mbarrier_phases():
    """test_wait.parity: true for the phase before the current one, false for the current."""
    got = per_thread(
        MBARRIER.format(count=32)
        + """
      mbarrier.test_wait.parity.shared.b64 %p1, [%r1], 0;
      mbarrier.test_wait.parity.shared.b64 %p2, [%r1], 1;
      bar.sync 0;
      mbarrier.arrive.shared.b64 %rd1, [%r1];
      bar.sync 0;
      mbarrier.test_wait.parity.shared.b64 %p3, [%r1], 0;
      mbarrier.test_wait.parity.shared.b64 %p4, [%r1], 1;
      selp.b32 %r0, 1, 0, %p1;
      @%p2 or.b32 %r0, %r0, 2;
      @%p3 or.b32 %r0, %r0, 4;
      @%p4 or.b32 %r0, %r0, 8;
    """
    )
    assert (got == 2 + 4).all()


def test_mbarrier_orders_memory_between_warps():
    body = (
        MBARRIER.format(count=32)
        + """
      setp.ge.u32 %p1, %tid, 32;
      @%p1 bra consumer;
      shl.b32 %r2, %tid, 2;
      add.u32 %r2, %r2, %r1;
      st.shared.b32 [%r2+1024], %tid;
      {arrive}
      bra done;
    consumer:
      mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0;
      @!%p2 bra consumer;
      shl.b32 %r2, %tid, 2;
      add.u32 %r2, %r2, %r1;
      ld.shared.b32 %r0, [%r2+896];
    done:
    """
    )
    got = per_thread(
        body.replace("{arrive}", "mbarrier.arrive.shared.b64 %rd1, [%r1];"), threads=64
    )
    np.testing.assert_array_equal(got[32:], np.arange(32))
    with pytest.raises(SimulationError) as raised:
        per_thread(body.replace("{arrive}", ""), threads=64)
    assert raised.value.findings[0].kind == "deadlock"
    assert "32 of 32 arrivals" in str(raised.value)


def test_too_many_arrivals():
    body = (
        MBARRIER.format(count=16)
        + """
      setp.lt.u32 %p1, %tid, 16;
      mov.u32 %r2, 2;
      @%p1 mbarrier.arrive.shared.b64 %rd1, [%r1], 5;
    """
    )
    assert findings(body) == ["mbarrier overrun"]


def test_initialisation_must_be_ordered_before_use():
    body = (
        MBARRIER.replace("bar.sync 0;", "").format(count=64)
        + """
      mbarrier.arrive.shared.b64 %rd1, [%r1];
    """
    )
    assert findings(body, threads=64)[0] in (
        "mbarrier used before its initialisation", "uninitialised mbarrier"
    )  # fmt: skip


# ---- 9.7.13 bar.warp.sync; 8 Memory Consistency Model


def test_threads_of_a_warp_need_a_warp_barrier():
    """bar.warp.sync: "guarantees memory ordering among participating threads"."""
    body = """
      mov.u32 %r1, smem;
      shl.b32 %r2, %tid, 2;
      add.u32 %r3, %r1, %r2;
      st.shared.b32 [%r3], %tid;
      {barrier}
      xor.b32 %r4, %r2, 4;
      add.u32 %r4, %r1, %r4;
      ld.shared.b32 %r0, [%r4];
    """
    got = per_thread(body.format(barrier="bar.warp.sync -1;"))
    np.testing.assert_array_equal(got, LANES ^ 1)
    with pytest.raises(SimulationError) as raised:
        per_thread(body.format(barrier=""))
    assert "no bar.warp.sync between" in str(raised.value)


RELEASE = (
    MBARRIER.format(count=1)
    + """
      setp.ge.u32 %p1, %tid, 32;
      @%p1 bra consumer;
      shl.b32 %r2, %tid, 2;
      add.u32 %r2, %r2, %r1;
      st.shared.b32 [%r2+1024], %tid;
      {barrier}
      @%p7 mbarrier.arrive.shared.b64 %rd1, [%r1];
      bra done;
    consumer:
      mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0;
      @!%p2 bra consumer;
      shl.b32 %r2, %tid, 2;
      add.u32 %r2, %r2, %r1;
      ld.shared.b32 %r0, [%r2+896];
    done:
    """
)


def test_one_thread_releases_for_its_warp_only_after_a_warp_barrier():
    got = per_thread(RELEASE.replace("{barrier}", "bar.warp.sync -1;"), threads=64)
    np.testing.assert_array_equal(got[32:], LANES)
    with pytest.raises(SimulationError) as raised:
        per_thread(RELEASE.replace("{barrier}", ""), threads=64)
    assert "shared-memory race" in [f.kind for f in raised.value.findings]


# ---- 9.7.19 setmaxnreg

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
