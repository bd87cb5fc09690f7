"""A decoder as Llama 3 is: grouped-query attention, rotary positions, RMSNorm, SwiGLU.

    python examples/llama.py        # trains a tiny one to count, then lets it count on

Generation keeps the keys and values of each layer in a cache, prompt first, then token by token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jax_flashcute import nn


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; the defaults are those of Llama 3 8B."""

    vocabulary: int = 128_256
    layers: int = 32
    features: int = 4096
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 14_336
    rope_theta: float = 500_000.0
    dtype: Any = jnp.bfloat16
    implementation: str | None = None


TINY = Config(
    vocabulary=32, layers=2, features=32, heads=4, kv_heads=2, hidden=64, dtype=jnp.float32
)


class Block(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        def linear(width_in: int, width_out: int) -> nnx.Linear:
            return nnx.Linear(width_in, width_out, use_bias=False, dtype=config.dtype, rngs=rngs)

        self.attention_norm = nnx.RMSNorm(config.features, rngs=rngs)
        self.attention = nn.FlashAttention(
            config.features,
            config.heads,
            num_kv_heads=config.kv_heads,
            rope_theta=config.rope_theta,
            is_causal=True,
            implementation=config.implementation,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.hidden_norm = nnx.RMSNorm(config.features, rngs=rngs)
        self.gate = linear(config.features, config.hidden)
        self.up = linear(config.features, config.hidden)
        self.down = linear(config.hidden, config.features)

    def __call__(self, x, cache, attention):
        out = self.attention(self.attention_norm(x), cache=cache, **attention)
        out, cache = (out, None) if cache is None else out
        x = x + out
        y = self.hidden_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y)), cache


class Llama(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(
            config.vocabulary, config.features, dtype=config.dtype, rngs=rngs
        )
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.features, rngs=rngs)
        self.head = nnx.Linear(config.features, config.vocabulary, use_bias=False, rngs=rngs)

    def init_caches(self, batch: int, max_length: int, dtype=jnp.bfloat16) -> list[nn.KVCache]:
        return [block.attention.init_cache(batch, max_length, dtype) for block in self.blocks]

    def __call__(self, tokens: jax.Array, caches: list[nn.KVCache] | None = None, **attention):
        """Logits (B, T, vocabulary) in float32 of tokens (B, T), and with caches these too.

        `attention` goes to every layer's attention: `segment_ids` for packed sequences.
        """
        x, after = self.embedding(tokens), []
        for i, block in enumerate(self.blocks):
            x, cache = block(x, None if caches is None else caches[i], attention)
            after.append(cache)
        logits = self.head(self.norm(x).astype(jnp.float32))
        return logits if caches is None else (logits, after)


def generate(model, prompt: jax.Array, count: int, dtype=jnp.bfloat16) -> jax.Array:
    """The `count` likeliest next tokens (B, count), one by one, after a prompt (B, T).

    `model` is called as `Llama` is.
    """
    step = nnx.jit(lambda model, tokens, caches: model(tokens, caches))
    caches = model.init_caches(prompt.shape[0], prompt.shape[1] + count, dtype)
    tokens, written = prompt, []
    for _ in range(count):
        logits, caches = step(model, tokens, caches)
        tokens = jnp.argmax(logits[:, -1:], axis=-1)
        written.append(tokens)
    return jnp.concatenate(written, axis=1)


def train(model, batches, loss_of, learning_rate: float = 3e-3) -> list[float]:
    """The losses `loss_of(model, batch)`, one for each batch, of which each trains the model."""
    optimizer = nnx.Optimizer(model, optax.adamw(learning_rate), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        loss, gradients = nnx.value_and_grad(loss_of)(model, batch)
        optimizer.update(model, gradients)
        return loss

    return [float(step(model, optimizer, batch)) for batch in batches]


def next_token_loss(model, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of tokens (B, T + 1), each predicted from those before it."""
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def counting(vocabulary: int, steps: int, length: int = 24):
    """Batches of sequences that count on from a random number."""
    for key in jax.random.split(jax.random.key(0), steps):
        start = jax.random.randint(key, (8, 1), 0, vocabulary)
        yield (start + jnp.arange(length)) % vocabulary


def main(steps: int = 60) -> list[float]:
    model = Llama(TINY, rngs=nnx.Rngs(0))
    losses = train(model, counting(TINY.vocabulary, steps), next_token_loss)
    print(f"loss {losses[0]:.2f} before, {losses[-1]:.2f} after {steps} steps")
    print("5 6 7 8 and on:", *generate(model, jnp.asarray([[5, 6, 7, 8]]), 8, jnp.float32)[0])
    return losses


if __name__ == "__main__":
    main()
