"""What a program asks of its own arrays does not hold for what the library computes."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding


def of_any_rank[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """``function``, in which arrays of different ranks broadcast.

    ``jax_numpy_rank_promotion="raise"`` is there to find broadcasts that nobody meant.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return wrapped


def own_sharding(array: jax.Array) -> NamedSharding | None:
    """The sharding that an array's type has on explicit meshes, where scatters ask for one."""
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None
