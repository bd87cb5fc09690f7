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


def lacks_registers(needed: int) -> list[str]:
    """The same of all threads' registers."""
    return [f"registers: {needed} needed, {REGISTERS} available"] if needed > REGISTERS else []


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
