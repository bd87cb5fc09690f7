"""A byte-level decoder in Flax NNX, whose attention is `jax_flashcute`'s.

Grouped-query attention, rotary positions, RMSNorm, SwiGLU.  `train_byte_lm.py` trains it on whole
sequences; `serve.py` runs it on a few new tokens at a time, with the keys and values of the others
in a cache: for that the caller hands in the tokens' positions and what attention is to do.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from jax_flashcute import flash_attention

VOCABULARY = 256  # bytes

Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
"""From the layer and query (B, T, N, H), key and value (B, T, K, H) to what is attended to."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the decoder; query heads share key/value heads in groups."""

    layers: int
    width: int
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int


SIZES = {
    "tiny": ModelConfig(layers=3, width=128, q_heads=4, kv_heads=2, head_dim=32, hidden=384),
    "small": ModelConfig(layers=6, width=384, q_heads=6, kv_heads=2, head_dim=64, hidden=1024),
    "base": ModelConfig(layers=12, width=768, q_heads=12, kv_heads=4, head_dim=64, hidden=2048),
    "large": ModelConfig(layers=16, width=1536, q_heads=12, kv_heads=4, head_dim=128, hidden=4096),
}


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary embedding of (B, T, N, H): pair (i, i + H/2) turns by position / 10000^(2i/H).

    `positions` are (T,), or (B, T) where each sequence has its own.
    """
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attend_causally(implementation: str | None) -> Attend:
    """Attention of whole sequences to themselves."""

    def attend(layer, query, key, value):
        if implementation == "jax_nn_cudnn":
            return jax.nn.dot_product_attention(
                query, key, value, is_causal=True, implementation="cudnn"
            )
        return flash_attention(query, key, value, is_causal=True, implementation=implementation)

    return attend


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, dtype, *, rngs: nnx.Rngs):
        def linear(width_in, width_out):
            return nnx.Linear(width_in, width_out, use_bias=False, dtype=dtype, rngs=rngs)

        q_width, kv_width = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = linear(config.width, q_width)
        self.key = linear(config.width, kv_width)
        self.value = linear(config.width, kv_width)
        self.out = linear(q_width, config.width)
        self.head_dim = config.head_dim

    def __call__(self, x: jax.Array, positions: jax.Array, attend: Callable) -> jax.Array:
        def heads(projected):
            return projected.reshape(*x.shape[:2], -1, self.head_dim)

        query = rotate(heads(self.query(x)), positions)
        key = rotate(heads(self.key(x)), positions)
        attended = attend(query, key, heads(self.value(x)))
        return self.out(attended.reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
    def __init__(self, config: ModelConfig, dtype, *, rngs: nnx.Rngs):
        def linear(width_in, width_out):
            return nnx.Linear(width_in, width_out, use_bias=False, dtype=dtype, rngs=rngs)

        self.gate = linear(config.width, config.hidden)
        self.up = linear(config.width, config.hidden)
        self.down = linear(config.hidden, config.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, dtype, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, dtype, rngs=rngs)
        self.feed_forward_norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.feed_forward = FeedForward(config, dtype, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, attend: Callable) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), positions, attend)
        return x + self.feed_forward(self.feed_forward_norm(x))


class ByteDecoder(nnx.Module):
    """(B, T) bytes -> (B, T, 256) float32 logits of the next byte."""

    def __init__(
        self, config: ModelConfig, dtype, implementation: str | None = None, *, rngs: nnx.Rngs
    ):
        self.config = config
        self.implementation = implementation
        # As a product, because the gradient of a look-up is a scatter, and on a GPU a scatter of
        # thousands of bytes into 256 rows is slow.
        self.embedding = nnx.Linear(
            VOCABULARY,
            config.width,
            use_bias=False,
            dtype=dtype,
            kernel_init=nnx.initializers.normal(stddev=config.width**-0.5),
            rngs=rngs,
        )
        self.blocks = nnx.List([Block(config, dtype, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.logits = nnx.Linear(config.width, VOCABULARY, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array | None = None, attend: Attend | None = None
    ) -> jax.Array:
        if positions is None:
            positions = jnp.arange(tokens.shape[1])
        if attend is None:
            attend = attend_causally(self.implementation)
        x = self.embedding(jax.nn.one_hot(tokens, VOCABULARY))
        for layer, block in enumerate(self.blocks):
            x = block(x, positions, functools.partial(attend, layer))
        return self.logits(self.norm(x)).astype(jnp.float32)


def generate_greedily(
    model: ByteDecoder, prompt: bytes, new_tokens: int, *, padded_to: int
) -> tuple[bytes, np.ndarray]:
    """The most probable byte again and again, the whole text computed anew for each: no cache.

    Returns:
      The new bytes, and for each by how much its logit exceeds that of the runner-up.
    """
    text = np.zeros(padded_to, np.int32)
    text[: len(prompt)] = np.frombuffer(prompt, np.uint8)
    stop = len(prompt) + new_tokens
    text, leads = _generate_greedily(model, jnp.asarray(text), len(prompt), stop)
    new = slice(len(prompt), stop)
    return bytes(np.asarray(text, np.uint8)[new]), np.asarray(leads)[new]


@nnx.jit
def _generate_greedily(model: ByteDecoder, text: jax.Array, start: int, stop: int):
    def next_byte(position, state):
        text, leads = state
        best, token = jax.lax.top_k(model(text[None])[0, position - 1], 2)
        return text.at[position].set(token[0]), leads.at[position].set(best[0] - best[1])

    return jax.lax.fori_loop(start, stop, next_byte, (text, jnp.zeros(text.shape)))


def save_model(path: Path, model: ByteDecoder) -> None:
    """Write sizes and parameters in the safetensors format."""
    parameters = {
        _name(keys): np.asarray(parameter[...])
        for keys, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(parameters, path, {"config": json.dumps(dataclasses.asdict(model.config))})


def load_model(path: Path, dtype, implementation: str | None = None) -> ByteDecoder:
    """The model that `save_model` wrote, computing in `dtype`."""
    with safe_open(path, framework="numpy") as file:
        config = ModelConfig(**json.loads(file.metadata()["config"]))
        model = nnx.eval_shape(lambda: ByteDecoder(config, dtype, implementation, rngs=nnx.Rngs(0)))
        expected = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
        if {_name(keys) for keys in expected} != set(file.keys()):
            raise ValueError(f"{path} must hold the parameters of {config}; got {file.keys()}")
        loaded = [
            (keys, parameter.replace(jnp.asarray(file.get_tensor(_name(keys)))))
            for keys, parameter in expected.items()
        ]
    nnx.update(model, nnx.from_flat_state(loaded))
    return model


def _name(keys: tuple) -> str:
    return ".".join(map(str, keys))
