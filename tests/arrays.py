"""Random arrays that a seed and a shape determine, whichever tests ran before."""

import jax
import jax.numpy as jnp
import numpy as np


def random(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    """Of the normal distribution."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)
