"""What a block has room for."""

SMEM_BYTES = 227 * 1024
"""Shared memory one block can have on Hopper and Blackwell."""


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
