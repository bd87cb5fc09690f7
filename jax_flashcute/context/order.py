"""The order in which the devices of a mesh axis hold the positions of a sequence."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jax_flashcute import analysis
from jax_flashcute.given import numbers, whole
from jax_flashcute.promotion import own_sharding

Order = Literal["zigzag", "striped", "contiguous"]
ORDERS: tuple[Order, ...] = ("zigzag", "striped", "contiguous")


def permute_sequence(array: ArrayLike, devices: int, *, order: Order = "zigzag", axis: int = 1):
    """A sequence in natural order, put into the order in which devices hold it.

    Best done once, to a model's tokens, labels and ``permuted_positions`` (for RoPE), where it
    costs next to nothing: everything but attention treats each position by itself.

    Args:
      array: any array.
      devices: P, of the mesh axis.
      order: as for ``context_parallel_attention``.
      axis: the sequence's.

    Returns:
      The array, sharded as it was on explicit meshes.

    Raises:
      ValueError: the length does not divide, or there is no such axis.
    """
    return _reordered(array, devices, order, axis, lambda positions: positions)


def restore_sequence(array: ArrayLike, devices: int, *, order: Order = "zigzag", axis: int = 1):
    """The inverse of ``permute_sequence``."""
    return _reordered(array, devices, order, axis, np.argsort)


def _reordered(array: ArrayLike, devices: int, order: Order, axis: int, of_positions: Callable):
    array = numbers("array", array)
    if axis not in range(-array.ndim, array.ndim):
        raise ValueError(f"axis must be one of array's {array.ndim} dimensions; got {axis!r}")
    axis %= array.ndim
    positions = of_positions(permuted_positions(array.shape[axis], devices, order=order))
    return array.at[(slice(None),) * axis + (positions,)].get(
        out_sharding=own_sharding(array), mode="promise_in_bounds"
    )


def permuted_positions(length: int, devices: int, *, order: Order = "zigzag") -> np.ndarray:
    """The natural position of every element of a permuted sequence: (length,) int32."""
    length, devices = whole("length", length, 0), whole("devices", devices, 1)
    layout = Layout("", devices, order)
    layout.check("array", length, devices)
    rows = np.arange(length // devices // layout.chunks, dtype=np.int32)
    chunks = [
        layout.first(device, chunk, rows.size) + layout.stride * rows
        for device in range(devices)
        for chunk in range(layout.chunks)
    ]
    return np.concatenate(chunks).astype(np.int32)


@dataclass(frozen=True)
class Layout:
    """Where the rows of a sequence lie: every device holds one chunk, or two in zig-zag order."""

    axis_name: str
    devices: int
    order: Order

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}; got {self.order!r}")

    @property
    def chunks(self) -> int:
        return 2 if self.order == "zigzag" else 1

    @property
    def stride(self) -> int:
        """From a row's position to that of the chunk's next row."""
        return self.devices if self.order == "striped" else 1

    def first(self, device, chunk: int, length: int):
        """The position of the first row of a device's chunk of ``length`` rows."""
        if self.order == "striped":
            return device
        return ((2 * self.devices - 1 - device) if chunk else device) * length

    def positions(self, length: int) -> jax.Array:
        """Of this device's ``length`` rows."""
        device, rows = lax.axis_index(self.axis_name), length // self.chunks
        firsts = [self.first(device, chunk, rows) for chunk in range(self.chunks)]
        return jnp.concatenate([first + self.stride * jnp.arange(rows) for first in firsts])

    def check(self, name: str, length: int, parts: int) -> None:
        """Refuse a length that ``parts`` devices' chunks do not divide."""
        unit = parts * self.chunks
        if length % unit or length == 0:
            what = "a device's part of it" if parts == 1 else f"{parts} devices"
            raise ValueError(
                f"{name} must have a positive multiple of {unit} rows for {what} in "
                f"{self.order} order; got {length}"
            )
        if length // parts * self.devices >= analysis.POSITION_LIMIT:
            raise ValueError(
                f"{name} must have fewer than {analysis.POSITION_LIMIT} rows over all devices; "
                f"got {length // parts * self.devices}"
            )

    def step(self, array: jax.Array, shift: int) -> jax.Array:
        """What device ``r - shift`` holds, to device r."""
        if shift % self.devices == 0:
            return array
        sends = [(r, (r + shift) % self.devices) for r in range(self.devices)]
        return lax.ppermute(array, self.axis_name, sends)
