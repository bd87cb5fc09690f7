"""What a block has room for."""

SMEM_BYTES = 227 * 1024
"""Shared memory one block can have on Hopper and Blackwell."""

REGISTERS = 65536
"""Registers of a block, at most."""


def lacks_smem(needed: int, what: str = "shared memory") -> list[str]:
    """Why so many bytes of shared memory are too many; empty where they are not."""
    if needed <= SMEM_BYTES:
        return []
    return [f"{what}: {needed} bytes needed, {SMEM_BYTES} available"]


def lacks_registers(of_warpgroups: list[int]) -> list[str]:
    """The same of registers, of a thread of each warpgroup; they share what they start with.

    That is as many each, a multiple of eight.  Who asks for more than there are waits for ever.
    """
    threads = 128 * len(of_warpgroups)
    available = REGISTERS // threads // 8 * 8 * threads
    needed = 128 * sum(of_warpgroups)
    return [f"registers: {needed} needed, {available} available"] if needed > available else []


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
