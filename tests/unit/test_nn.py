"""Flax's modules through ``flash_attention``, against their own attention functions."""

import functools
import subprocess
import sys

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_flashcute import nn

B, T, FEATURES, HEADS = 2, 13, 24, 3

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def padding_mask() -> jax.Array:
    """(B, 1, T, T) in float32, as Flax makes masks; every row sees a key."""
    tokens = jnp.arange(T)[None] < jnp.asarray([[9], [T]])
    padding = linen.make_attention_mask(jnp.ones_like(tokens), tokens)
    return linen.combine_masks(padding, linen.make_causal_mask(tokens))


def linen_module(attention_fn=None, **options) -> linen.Module:
    if attention_fn is not None:
        options["attention_fn"] = attention_fn
    return linen.MultiHeadDotProductAttention(num_heads=HEADS, **options)


def nnx_module(attention_fn=None, **options) -> nnx.Module:
    if attention_fn is not None:
        options["attention_fn"] = attention_fn
    options = {"decode": False, **options}
    return nnx.MultiHeadAttention(HEADS, FEATURES, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("batch", [(B,), (), (B, 3)])
def test_linen(batch: tuple[int, ...]) -> None:
    """Value and gradients, with a mask of floats."""
    x = normal(0, *batch, T, FEATURES)
    mask = padding_mask() if batch == (B,) else linen.make_causal_mask(x[..., 0])
    own, ours = linen_module(), linen_module(nn.make_attention_fn())
    variables = own.init(jax.random.key(1), x)

    def loss(module, variables):
        return jnp.sum(jnp.sin(module.apply(variables, x, mask=mask)))

    close(ours.apply(variables, x, mask=mask), own.apply(variables, x, mask=mask))
    gradients = [jax.grad(functools.partial(loss, module))(variables) for module in (ours, own)]
    jax.tree.map(close, *gradients)


def test_linen_decodes() -> None:
    x = normal(0, B, T, FEATURES)
    outs = []
    for attention_fn in (None, nn.make_attention_fn()):
        module = linen_module(attention_fn, decode=True)
        variables = module.init(jax.random.key(1), x)
        params, cache = variables["params"], variables["cache"]
        steps = []
        for i in range(4):
            out, updated = module.apply(
                {"params": params, "cache": cache}, x[:, i : i + 1], mutable=["cache"]
            )
            cache = updated["cache"]
            steps.append(out)
        outs.append(jnp.concatenate(steps, axis=1))
    close(outs[1], outs[0])


@pytest.mark.parametrize("causal", [False, True])
def test_nnx(causal: bool) -> None:
    x, mask = normal(0, B, T, FEATURES), padding_mask()
    own, ours = nnx_module(), nnx_module(nn.make_attention_fn())

    def loss(module):
        return jnp.sum(jnp.sin(module(x, mask=mask, is_causal=causal)))

    close(ours(x, mask=mask, is_causal=causal), own(x, mask=mask, is_causal=causal))
    gradients = [nnx.state(nnx.grad(loss)(module), nnx.Param) for module in (ours, own)]
    jax.tree.map(close, *gradients)


def test_nnx_decodes() -> None:
    x = normal(0, B, T, FEATURES)
    own, ours = nnx_module(decode=True), nnx_module(nn.make_attention_fn(), decode=True)
    for module in (own, ours):
        module.init_cache(x.shape)
    for i in range(4):
        close(ours(x[:, i : i + 1], is_causal=True), own(x[:, i : i + 1], is_causal=True))


def test_options_of_the_function() -> None:
    """A window for every call, beside the module's own mask."""
    x = normal(0, B, T, FEATURES)
    window = jnp.abs(jnp.arange(T)[:, None] - jnp.arange(T)) <= 3
    own = nnx_module()
    ours = nnx_module(nn.make_attention_fn(local_window_size=3, is_causal=True))
    close(ours(x), own(x, mask=window & jnp.tri(T, dtype=bool)))
    for name in ("mask", "local_windows_size"):
        with pytest.raises(ValueError, match=f"options: expected arguments of .*; got {name}"):
            nn.make_attention_fn(**{name: window})


def test_positions_that_a_module_does_not_tell() -> None:
    """Refused in decoding; in cross-attention the offset may be said."""
    x = normal(0, B, T, FEATURES)
    for options in (
        {"is_causal": True},
        {"local_window_size": 0},
        {"mask_mod": lambda b, h, q, kv: q >= kv},
        {"score_mod": lambda score, b, h, q, kv: score + kv - q},
        {"compress_factor": 2},
    ):
        ours = nnx_module(nn.make_attention_fn(**options), decode=True)
        ours.init_cache(x.shape)
        message = f"{next(iter(options))} with 1 queries and {T} keys"
        with pytest.raises(NotImplementedError, match=message):
            ours(x[:, :1])
    module = nnx_module(nn.make_attention_fn(is_causal=False, local_window_size=None), decode=True)
    module.init_cache(x.shape)
    assert module(x[:, :1]).shape == (B, 1, FEATURES)

    crossing = nnx_module(nn.make_attention_fn(is_causal=True))
    with pytest.raises(NotImplementedError, match=r"5 queries and 13 keys: .*q_offset .*cross-att"):
        crossing(x[:, :5], x)
    crossing = nnx_module(nn.make_attention_fn(is_causal=True, q_offset=0))
    close(crossing(x[:, :5], x), nnx_module()(x[:, :5], x, mask=jnp.tri(5, T, dtype=bool)))


def test_what_it_refuses() -> None:
    x = normal(0, B, T, FEATURES)
    fn = nn.make_attention_fn()
    dropout = nnx_module(fn, dropout_rate=0.5)
    with pytest.raises(NotImplementedError, match=r"dropout_rate=0\.5"):
        dropout(x, deterministic=False, rngs=nnx.Rngs(0))
    close(dropout(x, deterministic=True), nnx_module()(x))
    with pytest.raises(NotImplementedError, match="sow_weights"):
        nnx_module(fn)(x, sow_weights=True)
    module = linen_module(fn, dropout_rate=0.5, deterministic=False, precision="highest")
    with pytest.raises(NotImplementedError, match=r"dropout_rate=0.5\n.*precision=highest"):
        module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    with pytest.raises(NotImplementedError, match="sow_weights"):
        linen_module(fn).init(jax.random.key(0), x, sow_weights=True)


# ---- the module ----------------------------------------------------------------------------


def make_module(**options) -> nn.FlashAttention:
    defaults = {"num_kv_heads": 2, "head_dim": 8, "rope_theta": 100.0, "is_causal": True}
    module = nn.FlashAttention(FEATURES, 6, rngs=nnx.Rngs(0), **(defaults | options))
    if module.sinks is not None:
        module.sinks[...] = normal(3, 6)
    return module


@pytest.mark.parametrize(
    "options", [{}, {"local_window_size": (4, 0), "sinks": True}, {"logits_soft_cap": 2.0}]
)
def test_decoding_gives_what_one_call_gives(options: dict) -> None:
    """A prompt, then token by token under jit; sequences of several lengths share the cache."""
    module, x = make_module(**options), normal(0, B, T, FEATURES)
    whole = module(x)
    reference = make_module(**options, implementation="reference")
    close(whole, reference(x))

    cache = module.init_cache(B, T + 3, jnp.float32)
    out, cache = module(x[:, :5], cache=cache)
    outs, step = [out], nnx.jit(lambda module, x, cache: module(x, cache=cache))
    for i in range(5, T):
        out, cache = step(module, x[:, i : i + 1], cache)
        outs.append(out)
    close(jnp.concatenate(outs, axis=1), whole)
    np.testing.assert_array_equal(cache.lengths, [T, T])


def test_a_cache_of_symbolic_batch() -> None:
    module, x = make_module(), normal(0, B, 2, FEATURES)

    def run(x):
        return module(x, cache=module.init_cache(x.shape[0], 8, jnp.float32))[0]

    signature = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), 2, FEATURES), x.dtype)
    close(jax.export.export(jax.jit(run))(signature).call(x), run(x))


def test_a_full_cache() -> None:
    """Said where the lengths are known; NaN, for that sequence alone, where they are traced."""
    module, x = make_module(), normal(0, B, 2, FEATURES)
    cache = module.init_cache(B, 8, jnp.float32)
    with pytest.raises(ValueError, match="room for 8 tokens, got 9 at once"):
        module(normal(0, B, 9, FEATURES), cache=cache)
    _, cache = module(normal(1, B, 6, FEATURES), cache=cache)
    cache = nn.KVCache(cache.key, cache.value, jnp.asarray([7, 6], jnp.int32))
    with pytest.raises(ValueError, match="room for 8 tokens, got 7 and 2 more"):
        module(x, cache=cache)
    step = nnx.jit(lambda module, x, cache: module(x, cache=cache))
    for _ in range(2):
        out, after = step(module, x, cache)
        assert np.isnan(out[0]).all()
        assert np.isfinite(out[1]).all()
    assert after.lengths[0] < 0
    assert np.isnan(step(module, x[:, :1], after)[0][0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 4}, "num_heads must be a multiple of 4 kv heads, got 6"),
        ({"num_kv_heads": 0}, "num_kv_heads must be an integer of at least 1; got 0"),
        ({"head_dim": 8.0}, "head_dim must be an integer of at least 1; got 8.0"),
        ({"bias": jnp.zeros(5)}, r"options must hold no arrays.*; got \['bias'\]"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"causal": True}, "options: expected arguments of flash_attention .*; got causal"),
        ({"head_dim": None, "num_kv_heads": 1}, None),
    ],
)
def test_sizes(options: dict, message: str | None) -> None:
    if message is None:
        assert make_module(**options).head_dim == FEATURES // 6
        return
    with pytest.raises(ValueError, match=message):
        make_module(**options)


def test_calls_that_do_not_fit() -> None:
    module, x = make_module(), normal(0, B, 2, FEATURES)
    cache = module.init_cache(B, 8, jnp.float32)
    with pytest.raises(ValueError, match="; got return_residual"):
        module(x, return_residual=True)
    for name in ("q_offset", "key_value_seq_lengths"):
        with pytest.raises(ValueError, match=f"; got {name}"):
            module(x, cache=cache, **{name: jnp.ones(B, jnp.int32)})
    with pytest.raises(ValueError, match="cache must be of 2 sequences, as x is; got 1"):
        module(x, cache=module.init_cache(1, 8))
    for wrong in (x[0], x[..., :-1]):
        with pytest.raises(
            ValueError, match=rf"x must be \(batch, length, {FEATURES}\); got shape"
        ):
            module(wrong)
    out, _ = module(x[:0], cache=module.init_cache(0, 8))
    assert out.shape == (0, 2, FEATURES)
    sparse = nn.NativeSparseAttention(FEATURES, 6, head_dim=8, rngs=nnx.Rngs(0))
    assert sparse(x[:0]).shape == (0, 2, FEATURES)
    with pytest.raises(ValueError, match=r"x must be \(batch, length"):
        sparse(x[0])
    tokens = jnp.zeros((B, 1, 2, 8))
    with pytest.raises(ValueError, match=r"value must be \(2, 1, 2, 8\) .*, got \(1, 1, 2, 8\)"):
        cache.append(tokens, tokens[:1])


def test_packed_sequences_do_not_see_each_other() -> None:
    module, x = make_module(), normal(0, 1, T, FEATURES)
    packed = module(x, segment_ids=jnp.asarray([[0] * 5 + [1] * (T - 5)]))
    close(packed[:, :5], module(x[:, :5]))
    close(packed[:, 5:], module(x[:, 5:]))  # rotary positions are relative


def test_attention_functions_need_no_flax() -> None:
    code = (
        "import sys; from jax_flashcute import nn; nn.make_attention_fn(); "
        "assert 'flax' not in sys.modules; nn.FlashAttention; assert 'flax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
