"""Stretches of the tiles that a block visits: one loop computes each."""

from collections.abc import Callable
from typing import NamedTuple

from cutlass import Int32


class Stretch(NamedTuple):
    """Tiles that one loop computes, all in the same way.

    Attributes:
      count: how many there are.
      tile: gives the i-th.
      is_masked: positions or lengths may hide something in them.
      is_full: lists say that ``mask_mod`` hides nothing in them.
    """

    count: Int32
    tile: Callable[[Int32], Int32]
    is_masked: bool = True
    is_full: bool = False


def leftwards(end: Int32) -> Callable[[Int32], Int32]:
    """A function of i: the i-th tile from ``end``, the one before it first."""
    return lambda i: end - 1 - i
