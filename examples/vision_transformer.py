"""A vision transformer (Dosovitskiy et al., 2021) of Flax's own attention module.

    python examples/vision_transformer.py   # trains a tiny one to tell stripes apart

`nnx.MultiHeadAttention` runs through `flash_attention` by its `attention_fn`, and nothing else of
the model knows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from llama import train

from jax_flashcute import nn


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; the defaults are those of ViT-B/16."""

    image: int = 224
    patch: int = 16
    channels: int = 3
    classes: int = 1000
    layers: int = 12
    features: int = 768
    heads: int = 12
    hidden: int = 3072
    dtype: Any = jnp.bfloat16
    implementation: str | None = None


TINY = Config(
    image=16,
    patch=4,
    channels=1,
    classes=2,
    layers=2,
    features=32,
    heads=2,
    hidden=64,
    dtype=jnp.float32,
)


class Block(nnx.Module):
    def __init__(self, config: Config, attention_fn, *, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(config.features, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(
            config.heads,
            config.features,
            attention_fn=attention_fn,
            decode=False,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.up = nnx.Linear(config.features, config.hidden, dtype=config.dtype, rngs=rngs)
        self.down = nnx.Linear(config.hidden, config.features, dtype=config.dtype, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class VisionTransformer(nnx.Module):
    def __init__(self, config: Config, attention_fn=None, *, rngs: nnx.Rngs):
        if attention_fn is None:
            attention_fn = nn.make_attention_fn(implementation=config.implementation)
        patches = (config.image // config.patch) ** 2
        self.patches = nnx.Conv(
            config.channels,
            config.features,
            (config.patch, config.patch),
            strides=config.patch,
            dtype=config.dtype,
            rngs=rngs,
        )
        normal = nnx.initializers.normal(0.02)
        self.label = nnx.Param(jnp.zeros((1, 1, config.features)))
        self.positions = nnx.Param(normal(rngs.params(), (1, patches + 1, config.features)))
        self.blocks = nnx.List(
            [Block(config, attention_fn, rngs=rngs) for _ in range(config.layers)]
        )
        self.norm = nnx.LayerNorm(config.features, rngs=rngs)
        self.head = nnx.Linear(config.features, config.classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (B, classes) in float32 of images (B, image, image, channels)."""
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        label = jnp.broadcast_to(self.label[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([label, x], axis=1) + self.positions[...].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]).astype(jnp.float32))


def loss_of(model, batch) -> jax.Array:
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


def stripes(config: Config, steps: int):
    """Batches of noisy images with horizontal or vertical stripes, and which."""
    rows = jnp.arange(config.image) // 2 % 2
    for key in jax.random.split(jax.random.key(0), steps):
        noise, label = jax.random.split(key)
        labels = jax.random.bernoulli(label, 0.5, (16,)).astype(jnp.int32)
        image = jnp.where(labels[:, None, None] == 1, rows[:, None], rows[None]) - 0.5
        images = image[..., None] + 0.3 * jax.random.normal(noise, (*image.shape, 1))
        yield images, labels


def main(steps: int = 40) -> list[float]:
    model = VisionTransformer(TINY, rngs=nnx.Rngs(0))
    losses = train(model, stripes(TINY, steps), loss_of)
    print(f"loss {losses[0]:.2f} before, {losses[-1]:.2f} after {steps} steps")
    return losses


if __name__ == "__main__":
    main()
