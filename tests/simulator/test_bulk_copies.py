"""Bulk copies and cp.async: PTX ISA 9.0, 9.7.9 "Asynchronous Copy"."""

import numpy as np
import pytest

from tests.simulator import SimulationError
from tests.simulator.snippets import MBARRIER, STORE_WORD, execute

BULK_LOAD = (
    MBARRIER.format(count=1)
    + """
  @!%p7 bra wait;
  mbarrier.arrive.expect_tx.shared.b64 %rd1, [%r1], {expected};
  cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1+128], [%a1], 128, [%r1];
wait:
  {wait}
  shl.b32 %r2, %tid, 2;
  add.u32 %r2, %r2, %r1;
  ld.shared.b32 %r0, [%r2+128];
"""
)
WAIT = "mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0;\n  @!%p2 bra wait;"


def bulk_load(expected=128, wait=WAIT, **how):
    body = BULK_LOAD.replace("{expected}", str(expected)).replace("{wait}", wait)
    body += STORE_WORD
    source = np.arange(32, dtype=np.uint32) * 3
    return execute(body, np.zeros(32, np.uint32), source, **how)[0]


@pytest.mark.parametrize("timing", ["early", "late", "shuffled"])
def test_bulk_load_completes_its_mbarrier(timing):
    np.testing.assert_array_equal(bulk_load(timing=timing), np.arange(32) * 3)


def test_a_wrong_transaction_count_never_completes():
    with pytest.raises(SimulationError, match="deadlock") as raised:
        bulk_load(expected=144)
    assert "0 of 1 arrivals and 16 bytes outstanding" in str(raised.value)


@pytest.mark.parametrize("timing", ["early", "late", "shuffled"])
def test_reading_a_bulk_load_without_waiting_is_a_race(timing):
    with pytest.raises(SimulationError) as raised:
        bulk_load(wait="", timing=timing)
    assert "shared-memory race" in [f.kind for f in raised.value.findings]


BULK_STORE = """
  mov.u32 %r1, smem;
  shl.b32 %r2, %tid, 2;
  add.u32 %r3, %r1, %r2;
  st.shared.b32 [%r3], %tid;
  {fence}
  {barrier}
  setp.eq.u32 %p1, %tid, 0;
  @%p1 cp.{copy} [%a0], [%r1], 256;
  @%p1 cp.async.bulk.commit_group;
  {wait}
"""
STORE = {
    "fence": "fence.proxy.async.shared::cta;", "barrier": "bar.sync 0;",
    "copy": "async.bulk.global.shared::cta.bulk_group", "wait": "cp.async.bulk.wait_group 0;",
}  # fmt: skip


def bulk_store(**changes):
    how = {k: changes.pop(k) for k in ("timing", "seed", "warps") if k in changes}
    array = np.full(64, 5, np.float32 if "add" in changes.get("copy", "") else np.uint32)
    if array.dtype == np.float32:
        store = "st.shared.b32 [%r3], %tid;"
        assert store in BULK_STORE
        body = BULK_STORE.replace(store, "cvt.rn.f32.u32 %r5, %tid;\n st.shared.b32 [%r3], %r5;")
    else:
        body = BULK_STORE
    for name, text in {**STORE, **changes}.items():
        body = body.replace("{" + name + "}", text)
    return execute(body, array, threads=64, **how)[0]


@pytest.mark.parametrize("timing", ["early", "late", "shuffled"])
def test_bulk_store(timing):
    np.testing.assert_array_equal(bulk_store(timing=timing), np.arange(64))


def test_bulk_reduction():
    got = bulk_store(copy="reduce.async.bulk.global.shared::cta.bulk_group.add.f32")
    np.testing.assert_array_equal(got, np.arange(64) + 5)


@pytest.mark.parametrize(
    ("missing", "kind"),
    [
        ("fence", "missing proxy fence"),
        ("barrier", "shared-memory race"),
        ("wait", "shared memory released in use"),
    ],
)
def test_bulk_store_needs_every_step(missing, kind):
    with pytest.raises(SimulationError) as raised:
        bulk_store(**{missing: ""})
    assert kind in [f.kind for f in raised.value.findings] or (
        missing == "barrier" and raised.value.findings[0].kind == "uninitialised shared memory"
    )


def test_overwriting_what_a_bulk_store_still_reads():
    again = "cp.async.bulk.wait_group 0;\n bar.sync 0;\n st.shared.b32 [%r3], %tid;"
    bulk_store(wait=again)
    for broken in (again.replace("bar.sync 0;", ""), again.split("\n", 1)[1]):
        with pytest.raises(SimulationError) as raised:
            bulk_store(wait=broken + "\n cp.async.bulk.wait_group 0;")
        assert "shared-memory race" in [f.kind for f in raised.value.findings]


def cp_async(how: str, size: int, source: int | None = None) -> str:
    """Each thread copies ``size`` bytes, or ``source`` and zeros, from %a1 to smem, and waits."""
    sizes = size if source is None else f"{size}, {source}"
    return f"""
      mov.u32 %r1, smem;
      mul.lo.u32 %r2, %tid, {size};
      add.u32 %r3, %r1, %r2;
      cvt.u64.u32 %rd1, %r2;
      add.s64 %rd1, %rd1, %a1;
      cp.async.{how}.shared.global [%r3], [%rd1], {sizes};
      cp.async.commit_group;
      cp.async.wait_group 0;
    """


def test_cp_async_zero_fills():
    """cp.async: "the remaining bytes are filled with zeros" when src-size is smaller."""
    body = """
      bar.warp.sync -1;
      ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r3];
      add.u32 %r14, %r10, %r11;
      add.u32 %r15, %r12, %r13;
      shl.b32 %r15, %r15, 16;
      or.b32 %r0, %r14, %r15;
    """
    copy = cp_async("cg", 16, source=8)
    source = np.arange(128, dtype=np.uint32)
    got = execute(copy + body + STORE_WORD, np.zeros(32, np.uint32), source)[0]
    np.testing.assert_array_equal(got, 8 * np.arange(32) + 1)


def test_a_cp_async_needs_a_fence_before_the_asynchronous_proxy_reads():
    store = """
      setp.eq.u32 %p1, %tid, 0;
      @%p1 cp.async.bulk.global.shared::cta.bulk_group [%a0], [%r1], 256;
      @%p1 cp.async.bulk.commit_group;
      cp.async.bulk.wait_group 0;
    """
    copy, fence = cp_async("ca", 4) + "bar.sync 0;\n", "fence.proxy.async.shared::cta;"
    arrays = np.zeros(64, np.uint32), np.arange(64, dtype=np.uint32)
    got = execute(copy + fence + store, *arrays, threads=64)[0]
    np.testing.assert_array_equal(got, np.arange(64))
    with pytest.raises(SimulationError) as raised:
        execute(copy + store, *arrays, threads=64)
    assert "missing proxy fence" in [f.kind for f in raised.value.findings]
