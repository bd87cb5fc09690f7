"""Shuffles, votes, elections and reductions of a warp: PTX ISA 9.0, 9.7.9 and 9.7.13."""

import numpy as np
import pytest

from tests.simulator.snippets import LANES, per_thread


@pytest.mark.parametrize(
    ("mode", "amount", "clamp", "source"),
    [
        ("up", 3, 0, np.where(LANES >= 3, LANES - 3, LANES)),
        ("down", 5, 31, np.where(LANES + 5 <= 31, LANES + 5, LANES)),
        ("bfly", 4, 31, LANES ^ 4),
        ("idx", 7, 31, np.full(32, 7)),
        # Segments of 8: the mask 0x18 in bits 8-12, clamp within the segment.
        ("bfly", 4, 0x1807, LANES ^ 4),
        ("down", 5, 0x1807, np.where(LANES % 8 + 5 <= 7, LANES + 5, LANES)),
        ("idx", 3, 0x1807, LANES // 8 * 8 + 3),
    ],
)
def test_shuffle(mode, amount, clamp, source):
    got = per_thread(f"""
      add.u32 %r1, %tid, 100;
      shfl.sync.{mode}.b32 %r0|%p1, %r1, {amount}, {clamp}, -1;
    """)
    np.testing.assert_array_equal(got, source + 100)


def test_shuffle_tells_whether_the_source_was_in_range():
    got = per_thread("""
      shfl.sync.up.b32 %r1|%p1, %tid, 4, 0, -1;
      selp.b32 %r0, 1, 0, %p1;
    """)
    np.testing.assert_array_equal(got, LANES >= 4)


def test_votes_and_reductions():
    assert (
        per_thread("""
      setp.lt.u32 %p1, %tid, 5;
      vote.sync.ballot.b32 %r0, %p1, -1;
    """)
        == 31
    ).all()
    assert (per_thread("redux.sync.add.u32 %r0, %tid, -1;") == 496).all()
    assert (per_thread("redux.sync.max.s32 %r0, %tid, -1;") == 31).all()
    assert (
        per_thread("""
      setp.lt.u32 %p1, %tid, 5;
      vote.sync.any.pred %p2, %p1, -1;
      vote.sync.all.pred %p3, %p1, -1;
      selp.b32 %r1, 2, 0, %p2;
      selp.b32 %r2, 1, 0, %p3;
      or.b32 %r0, %r1, %r2;
    """)
        == 2
    ).all()


def test_match_and_masked_votes():
    got = per_thread("""
      and.b32 %r1, %tid, 3;
      match.any.sync.b32 %r0, %r1, -1;
    """)
    np.testing.assert_array_equal(got, 0x11111111 << (np.arange(32) % 4))


def test_elect_chooses_one_thread_always_the_same():
    """elect.sync: "the election is deterministic for a membermask"."""
    body = """
      elect.sync %r1|%p1, -1;
      elect.sync %r2|%p2, -1;
      selp.b32 %r0, 1, 0, %p1;
      @%p2 add.u32 %r0, %r0, 2;
    """
    for seed in range(5):
        got = per_thread(body, warps="seeded", seed=seed)
        assert sorted(got)[-1] == 3
        assert got.sum() == 3
