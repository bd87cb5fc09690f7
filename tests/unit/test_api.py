"""Arguments: what is taken, in which forms, and what every wrong one is told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import flash_attention, make_block_mask, masks
from jax_flashcute.arguments import follows_xla_flags
from jax_flashcute.nsa import NSAConfig, native_sparse_attention
from tests.cases import Case

reference = functools.partial(flash_attention, implementation="reference")


def array(*shape: int, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


QUERY, KEY, VALUE = array(2, 8, 4, 16), array(2, 10, 2, 16), array(2, 10, 2, 24)


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("query must be .*length, heads, head_dim.*got shape", {"query": array(8, 4)}),
        ("key must be", {"key": array(1, 2, 10, 2, 16)}),
        ("value must have as many dimensions as query", {"value": array(10, 2, 24)}),
        ("query must have a dtype of .*got int32", {"query": array(2, 8, 4, 16, dtype=jnp.int32)}),
        ("key must have query's dtype, float32; got", {"key": KEY.astype(jnp.bfloat16)}),
        ("value must have query's dtype", {"value": VALUE.astype(jnp.float16)}),
        ("key must have query's batch and head_dim", {"key": array(3, 10, 2, 16)}),
        ("key must have query's batch and head_dim", {"key": array(2, 10, 2, 8)}),
        ("value must have key's batch, length and heads", {"value": array(2, 9, 2, 16)}),
        ("value must have key's batch, length and heads", {"value": array(2, 10, 1, 16)}),
        ("query must have a multiple of key's 2 heads; got 3", {"query": array(2, 8, 3, 16)}),
        ("at least one head", {"query": array(2, 8, 0, 16)}),
        ("bias must be floating point; got dtype int32", {"bias": array(8, 10, dtype=jnp.int32)}),
        ("bias must broadcast to .*\\(2, 4, 8, 10\\); got shape", {"bias": array(2, 8, 10)}),
        ("bias must broadcast", {"bias": array(1, 1, 1, 1, 1)}),
        ("mask must be bool; got dtype float32", {"mask": array(8, 10)}),
        ("mask must broadcast", {"mask": array(7, 10, dtype=bool)}),
        ("query must be an array of numbers; got None", {"query": None}),
        ("bias must be an array of numbers; got 'x'", {"bias": "x"}),
        ("scale must be a scalar", {"scale": array(2)}),
        ("scale must be a number, known while tracing; got 'a'", {"scale": "a"}),
        ("is_causal must be True or False.*; got 'no'", {"is_causal": "no"}),
        ("deterministic must be True or False.*; got 2", {"deterministic": 2}),
        ("q_offset must be integers of 32 bits; got", {"q_offset": 2**40}),
        ("q_offset must be integers of 32 bits; got 0 to", {"q_offset": np.array([0, 2**31])}),
        ("q_offset must be an array of numbers; got 'end'", {"q_offset": "end"}),
        ("cu_seqlens_q must not decrease", {"cu_seqlens_q": [0, 5, 3], "cu_seqlens_k": [0, 1, 2]}),
        ("mask_mod must take \\(b, h, q_idx, kv_idx\\)", {"mask_mod": lambda q, kv: q >= kv}),
        ("score_mod must take \\(score, b, h", {"score_mod": lambda score, q, kv: score}),
        ("q_offset must be integers", {"q_offset": 1.5}),
        ("q_offset must be a scalar or \\(2,\\); got shape", {"q_offset": jnp.arange(3)}),
        ("query_seq_lengths must be integers", {"query_seq_lengths": array(2)}),
        ("query_seq_lengths must be a scalar or", {"query_seq_lengths": jnp.arange(4)}),
        (
            "key_value_seq_lengths must be a scalar",
            {"key_value_seq_lengths": jnp.ones((2, 1), int)},
        ),
        ("local_window_size must hold integers of at least 0", {"local_window_size": (-1, -1)}),
        ("local_window_size must hold integers", {"local_window_size": 1.5}),
        ("local_window_size must be an integer or a pair", {"local_window_size": (1, 2, 3)}),
        ("logits_soft_cap must be a positive number", {"logits_soft_cap": 0.0}),
        ("logits_soft_cap must be a positive number", {"logits_soft_cap": float("nan")}),
        ("sinks must have one value per query head, \\(4,\\)", {"sinks": array(2)}),
        ("sinks must be floating point", {"sinks": jnp.arange(4)}),
        ("implementation must be one of .*got 'cudnn'", {"implementation": "cudnn"}),
    ],
)
def test_a_wrong_argument_is_named(message: str, wrong: dict) -> None:
    arguments = {"query": QUERY, "key": KEY, "value": VALUE} | wrong
    with pytest.raises(ValueError, match=message):
        flash_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: flash_attention(**arguments))


@pytest.mark.parametrize(
    "name", ["is_causal", "local_window_size", "logits_soft_cap", "compress_factor"]
)
def test_what_is_part_of_the_program_is_not_traced(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must .*got .*Tracer"):
        jax.jit(lambda given: flash_attention(QUERY, KEY, VALUE, **{name: given}))(2)


def test_result_shapes_and_dtypes() -> None:
    out, lse = flash_attention(
        *(x.astype(jnp.bfloat16) for x in (QUERY, KEY, VALUE)), return_residual=True
    )
    assert (out.shape, out.dtype) == ((2, 8, 4, 24), jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 8, 4), jnp.float32)
    assert isinstance(flash_attention(QUERY, KEY, VALUE), jax.Array)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_without_a_batch(implementation: str) -> None:
    arrays = Case(batch=1, bias="nts", mask="ts", lengths=True, offset=True).arrays()
    batched, batched_lse = flash_attention(
        **arrays, implementation=implementation, return_residual=True
    )
    single = {
        name: array[0] if name in ("query", "key", "value", "bias") else array
        for name, array in arrays.items()
    }
    single["mask"] = arrays["mask"][0, 0]
    single["q_offset"] = arrays["q_offset"][0]
    single["key_value_seq_lengths"] = arrays["key_value_seq_lengths"][0]
    out, lse = flash_attention(**single, implementation=implementation, return_residual=True)
    np.testing.assert_array_equal(out, batched[0])
    np.testing.assert_array_equal(lse, batched_lse[0])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(
    "offset", [3, np.int64(3), jnp.asarray(3), jnp.asarray([3, 3], jnp.int8)], ids=str
)
def test_forms_of_q_offset(implementation: str, offset) -> None:
    arrays = Case(seqlen_q=20, seqlen_k=24).arrays()

    def attend(offset):
        return flash_attention(
            **arrays, is_causal=True, q_offset=offset, implementation=implementation
        )

    expected = reference(**arrays, mask=np.tri(20, 24, 3, dtype=bool))
    np.testing.assert_allclose(attend(offset), expected, atol=1e-5)
    np.testing.assert_allclose(jax.jit(attend)(offset), expected, atol=1e-5)


def test_scale() -> None:
    arrays = Case(seqlen_q=20, seqlen_k=24).arrays()
    query, key, value = arrays.values()
    expected = reference(query * 2, key, value, scale=0.25)
    np.testing.assert_allclose(reference(**arrays, scale=0.5), expected, atol=1e-6)
    np.testing.assert_allclose(reference(**arrays, scale=jnp.float32(0.5)), expected, atol=1e-6)
    traced = jax.jit(lambda scale: reference(**arrays, scale=scale))(0.5)
    np.testing.assert_allclose(traced, expected, atol=1e-6)
    default = reference(**arrays, scale=16**-0.5)
    np.testing.assert_allclose(reference(**arrays), default, atol=1e-6)


def test_a_huge_window_is_none() -> None:
    arrays = Case(seqlen_q=20, seqlen_k=24).arrays()
    huge = 2**31 - 1
    np.testing.assert_array_equal(
        flash_attention(**arrays, local_window_size=(huge, huge), implementation="xla"),
        flash_attention(**arrays, implementation="xla"),
    )
    causal = functools.partial(flash_attention, **arrays, is_causal=True, implementation="xla")
    np.testing.assert_array_equal(causal(local_window_size=(huge, 0)), causal())


def test_numpy_arrays_are_arrays() -> None:
    arrays = {name: np.asarray(x) for name, x in Case(bias="ts", sinks=True).arrays().items()}
    assert isinstance(flash_attention(**arrays), jax.Array)


@pytest.mark.parametrize(
    ("flags", "deterministic"),
    [
        ("", False),
        ("--xla_gpu_deterministic_ops=true", True),
        ("--xla_gpu_deterministic_ops", True),
        ("--xla_gpu_exclude_nondeterministic_ops=true --xla_foo=1", True),
        ("--xla_gpu_deterministic_ops=false", False),
    ],
)
def test_deterministic_follows_xla(
    monkeypatch: pytest.MonkeyPatch, flags: str, deterministic: bool
) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert follows_xla_flags() is deterministic


def test_donated_inputs() -> None:
    arrays = Case(seqlen_q=20, seqlen_k=20).arrays()
    expected = reference(**arrays)
    attend = jax.jit(lambda q, k, v: flash_attention(q, k, v), donate_argnums=0)
    out = attend(*(jnp.array(x) for x in arrays.values()))
    np.testing.assert_allclose(out, expected, atol=1e-5)


STRICT = {
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_disable_jit": True,
}


@pytest.mark.parametrize("name", STRICT)
def test_what_a_program_asks_of_its_own_code(name: str) -> None:
    """Segments, lists, lengths and native sparse attention, with gradients, under strict rules."""
    query = jax.random.normal(jax.random.key(0), (2, 20, 4, 8))
    key = query[:, :, :2]
    config = NSAConfig(block=8, num_selected=2, window=6, query_tile=8)

    def every(query, key):
        mask = masks.dilated(6, 2)
        listed = make_block_mask(mask, 2, 4, 20, 20, tile_m=8, tile_n=8)
        ids, lengths = jnp.arange(40).reshape(2, 20) // 7, jnp.asarray([0, 13])
        outs = [
            flash_attention(query, key, key, segment_ids=ids, is_causal=True),
            flash_attention(query, key, key, mask_mod=mask, block_mask=listed),
            flash_attention(query, key, key, key_value_seq_lengths=lengths),
            native_sparse_attention(query, key, key, config=config, key_value_seq_lengths=lengths),
        ]
        return sum(out.sum() for out in outs)

    before = getattr(jax.config, name)
    jax.config.update(name, STRICT[name])
    try:
        if name == "jax_disable_jit":
            assert flash_attention(query, key, key, is_causal=True).shape == query.shape
        else:
            jax.eval_shape(jax.grad(every, argnums=(0, 1)), query, key)
    finally:
        jax.config.update(name, before)
