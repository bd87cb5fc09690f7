"""Memories of the simulated device: arrays at made-up addresses, and a block's shared memory."""

import bisect

import numpy as np

from .program import SHARED_BASE


class Memory:
    """Bytes at an address, with a typed view for each element size."""

    def __init__(self, base: int, size: int, name: str, fill: int = 0):
        self.base, self.size, self.name = base, size, name
        self.data = np.full(-(-size // 256) * 256 + 256, fill, np.uint8)
        self._views = {}
        self.read_by = self.written_by = self.released_by = -1  # last launch that did

    def view(self, dtype) -> np.ndarray:
        view = self._views.get(dtype)
        if view is None:
            view = self._views[dtype] = self.data.view(dtype)
        return view


class GlobalMemory:
    """The arrays that a launch may touch, far apart so that an overrun hits nothing."""

    SPACING = 1 << 36

    def __init__(self):
        self._bases: list[int] = []
        self.memories: list[Memory] = []
        self.next = 0x10_0000_0000
        self.version = 0  # counts changes

    def allocate(self, size: int, name: str, fill: int) -> Memory:
        memory = Memory(self.next, size, name, fill)
        self.next += self.SPACING + -(-size // self.SPACING) * self.SPACING
        self.add(memory)
        return memory

    def add(self, memory: Memory) -> None:
        index = bisect.bisect(self._bases, memory.base)
        self._bases.insert(index, memory.base)
        self.memories.insert(index, memory)

    def find(self, address: int) -> Memory | None:
        """The array that an address falls in, or would fall in were it longer."""
        index = bisect.bisect(self._bases, address) - 1
        return self.memories[index] if index >= 0 else None


def shared_memory(size: int, poison: int) -> Memory:
    """A block's shared memory; addresses are indices, and start at SHARED_BASE."""
    memory = Memory(0, SHARED_BASE + size, "shared memory", poison & 0xFF)
    return memory
