"""Masks and scores written as functions: against the reference and against arrays that say it."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import analysis, api, explain, flash_attention, masks, xla
from jax_flashcute.kernels import registry
from tests.arrays import random
from tests.compare import assert_close, cotangent
from tests.user_functions import without_rule

B, T, S, N, K, H = 2, 70, 150, 4, 2, 8


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of at most 64, so that short sequences have several."""
    monkeypatch.setattr(xla, "_TILE_ELEMENTS_CPU", 1)


def inputs(t: int = T, s: int = S) -> dict:
    arrays = {"query": (B, t, N, H), "key": (B, s, K, H), "value": (B, s, K, H)}
    return {name: random(i, *shape) for i, (name, shape) in enumerate(arrays.items())}


def results(implementation: str, floating: dict, make) -> dict:
    """Out, LSE and the gradients of all of ``floating``; ``make`` says the rest of the call."""

    def attend(floating):
        call = {name: floating[name] for name in ("query", "key", "value")}
        call |= make(floating)
        return flash_attention(**call, implementation=implementation, return_residual=True)

    @jax.jit
    def run(floating):
        (out, lse), vjp = jax.vjp(attend, floating)
        (gradients,) = vjp((cotangent(out, 1), cotangent(lse, 2)))
        return {"out": out, "lse": lse} | {f"d_{name}": g for name, g in gradients.items()}

    return run(floating)


def documents(b, h, q, kv, ids):
    return ids[b, q] == ids[b, kv]


IDS = jnp.sort(jnp.asarray(np.random.default_rng(5).integers(0, 6, (B, 200))))
LIMITS = jnp.asarray([3, 0, 140, 60])
MASKS = {
    "causal": lambda b, h, q, kv: kv <= q,
    "window": lambda b, h, q, kv: (kv >= q - 5) & (kv <= q + 2),
    "documents": functools.partial(documents, ids=IDS),
    "head_limits": lambda b, h, q, kv: kv < LIMITS[h],
    "batch_parity": lambda b, h, q, kv: (q + kv + b) % 3 != 0,
    "nothing": lambda b, h, q, kv: kv < 0,
    "everything": lambda b, h, q, kv: jnp.bool_(True),
    "keys_only": lambda b, h, q, kv: kv % 2 == 0,
    "per_batch": lambda b, h, q, kv: b == 1,
}
EXTRAS = {
    "plain": {},
    "offset": {"q_offset": jnp.asarray([7, 40]), "is_causal": True},
    "lengths": {
        "key_value_seq_lengths": jnp.asarray([90, 0]),
        "query_seq_lengths": jnp.asarray([70, 33]),
    },
}


def as_array(function, s: int, t: int, offset) -> np.ndarray:
    """A mask function evaluated at every element, one by one as far as NumPy does."""
    b, h, q, kv = np.meshgrid(*(np.arange(n) for n in (B, N, t, s)), indexing="ij")
    q = q + np.broadcast_to(np.asarray(offset), B)[:, None, None, None]
    return np.broadcast_to(np.asarray(function(b, h, q, kv)), (B, N, t, s))


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_function_is_the_array_that_it_describes(name: str, extra: str) -> None:
    function, more = MASKS[name], EXTRAS[extra]
    array = jnp.asarray(as_array(function, S, T, more.get("q_offset", 0)))
    expected = results("xla", inputs(), lambda _: {"mask": array} | more)
    for implementation in ("xla", "reference"):
        actual = results(implementation, inputs(), lambda _: {"mask_mod": function} | more)
        assert_close(actual, expected, 2e-5)


def test_more_queries_than_keys() -> None:
    function = MASKS["window"]
    array = jnp.asarray(as_array(function, 60, 150, 0))
    floating = inputs(150, 60)
    actual = results("xla", floating, lambda _: {"mask_mod": function})
    assert_close(actual, results("reference", floating, lambda _: {"mask": array}), 2e-5)
    assert np.all(actual["out"][:, 70:] == 0)
    assert np.all(np.isneginf(actual["lse"][:, 70:]))
    assert np.all(actual["d_query"][:, 70:] == 0)


def alibi(f):
    return lambda s, b, h, q, kv: s - f["slopes"][h] * jnp.abs(q - kv)


def relative(f):
    return lambda s, b, h, q, kv: s + f["table"][h, jnp.clip(q - kv, -20, 20) + 20]


def per_batch_and_key(f):
    return lambda s, b, h, q, kv: s * (1 + 0.1 * f["rows"][b, q]) + jnp.tanh(f["columns"][kv])


def bounded(f):
    return lambda s, b, h, q, kv: jnp.where(kv <= q, f["scalar"] * jnp.sin(s), -jnp.inf)


SCORES = {
    "alibi": (alibi, {"slopes": (N,)}),
    "relative": (relative, {"table": (N, 41)}),
    "per_batch_and_key": (per_batch_and_key, {"rows": (B, 120), "columns": (S,)}),
    "bounded": (bounded, {"scalar": ()}),
    "constant": (lambda f: lambda s, b, h, q, kv: jnp.float32(0.5), {}),
    "squared": (lambda f: lambda s, b, h, q, kv: s * s, {}),
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", SCORES)
def test_a_score_function_and_what_it_closes_over(name: str, extra: str) -> None:
    """Under jit and grad, so that every array is traced: against autodiff of the reference."""
    make, shapes = SCORES[name]
    floating = inputs() | {n: random(9, *shape) for n, shape in shapes.items()}

    def call(f):
        return {"score_mod": make(f), "logits_soft_cap": 5.0} | EXTRAS[extra]

    actual = results("xla", floating, call)
    assert_close(actual, results("reference", floating, call), 3e-5)


def test_a_score_function_is_the_bias_that_it_describes() -> None:
    table = random(3, N, 41)
    distance = np.clip(np.arange(T)[:, None] - np.arange(S)[None], -20, 20) + 20
    expected = results("reference", inputs(), lambda _: {"bias": table[:, distance][None]})
    actual = results("xla", inputs(), lambda _: {"score_mod": relative({"table": table})})
    assert_close(actual, expected, 2e-5)


def test_mask_and_score_with_everything() -> None:
    floating = inputs() | {"slopes": random(4, N), "bias": random(5, 1, N, T, 1)}
    floating |= {"sinks": random(6, N)}

    def call(f):
        return {
            "mask_mod": MASKS["batch_parity"],
            "score_mod": alibi(f),
            "bias": f["bias"],
            "sinks": f["sinks"],
            "local_window_size": (40, None),
            "logits_soft_cap": 3.0,
        } | EXTRAS["offset"]

    actual = results("xla", floating, call)
    assert_close(actual, results("reference", floating, call), 3e-5)


def test_identity_is_the_program_not_the_object() -> None:
    def made(scale, array):
        return lambda s, b, h, q, kv: scale * s + array[h]

    def traced(scale, array):
        return masks.trace_score(made(scale, array), jnp.float32)[0]

    first = traced(2.0, random(0, N))
    assert first == traced(2.0, random(1, N))
    assert hash(first) == hash(traced(2.0, random(1, N)))
    assert first != traced(3.0, random(0, N))
    assert first != traced(2.0, random(0, N + 1))


def test_identity_includes_constants_of_nested_programs() -> None:
    def made(array):
        inner = jax.jit(lambda s, h: s + array[h])
        return masks.trace_score(lambda s, b, h, q, kv: inner(s, h), jnp.float32)[0]

    assert made(random(0, N)) == made(random(0, N))
    assert made(random(0, N)) != made(random(1, N))


def test_a_lambda_made_anew_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = []
    forward = xla.forward
    monkeypatch.setattr(xla, "forward", lambda *args: traces.append(1) or forward(*args))
    arrays = inputs(33, 35)
    for seed in range(3):
        slopes = random(seed, N)
        flash_attention(**arrays, score_mod=alibi({"slopes": slopes}), mask_mod=MASKS["causal"])
    assert len(traces) == 1


MAPPED = [
    ("query",),
    ("slopes",),
    ("ids",),
    ("query", "key", "value", "slopes", "ids"),
    ("offset",),
]


@pytest.mark.parametrize("mapped", MAPPED, ids="+".join)
def test_vmap(mapped: tuple[str, ...]) -> None:
    """Each element sees its own arrays and its own batch index; gradients too, both ways round."""
    size = 3
    shared = inputs(20, 24) | {
        "slopes": random(7, B, N),
        "ids": IDS[:, ::4],
        "offset": jnp.asarray([0, 5]),
    }
    rng = np.random.default_rng(11)
    arrays = {
        n: jnp.stack([jnp.asarray(rng.permuted(np.asarray(a), axis=-1)) for _ in range(size)])
        if n in mapped
        else a
        for n, a in shared.items()
    }
    axes = {n: 0 if n in mapped else None for n in arrays}
    floats = ("query", "key", "value", "slopes")

    def loss(implementation, floating, others):
        f = floating | others
        out, lse = flash_attention(
            f["query"],
            f["key"],
            f["value"],
            q_offset=f["offset"],
            mask_mod=lambda b, h, q, kv: (f["ids"][b, q] != f["ids"][b, kv]) | (kv == b),
            score_mod=lambda s, b, h, q, kv: s - f["slopes"][b, h] * jnp.abs(q - kv),
            implementation=implementation,
            return_residual=True,
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    def split(f):
        return {n: f[n] for n in floats}, {n: x for n, x in f.items() if n not in floats}

    def mapped_over(function):
        return jax.vmap(function, in_axes=split(axes))

    def total(implementation, *arguments):
        return jnp.sum(mapped_over(functools.partial(loss, implementation))(*arguments))

    value_and_grad = jax.value_and_grad(functools.partial(loss, "xla"))
    values, gradients = jax.jit(mapped_over(value_and_grad))(*split(arrays))
    expected = jax.jit(jax.value_and_grad(functools.partial(loss, "reference")))
    for i in range(size):
        one = {n: a[i] if n in mapped else a for n, a in arrays.items()}
        value, gradient = expected(*split(one))
        actual = {"value": values[i]} | {n: g[i] for n, g in gradients.items()}
        assert_close(actual, {"value": value} | gradient, 3e-5)
    actual = jax.jit(jax.grad(functools.partial(total, "xla")))(*split(arrays))
    wanted = jax.jit(jax.grad(functools.partial(total, "reference")))(*split(arrays))
    assert_close(actual, wanted, 3e-5)


def test_bfloat16_arrays_have_bfloat16_gradients() -> None:
    floating = inputs() | {"slopes": random(4, N)}
    floating = {n: x.astype(jnp.bfloat16) for n, x in floating.items()}
    actual = results("xla", floating, lambda f: {"score_mod": alibi(f)})
    assert actual["d_slopes"].dtype == jnp.bfloat16
    assert_close(actual, results("reference", floating, lambda f: {"score_mod": alibi(f)}), 4e-2)


BAD = {
    "mask_mod must return one boolean": {"mask_mod": lambda b, h, q, kv: kv - q},
    "score_mod must return one floating": {"score_mod": lambda s, b, h, q, kv: kv - q},
    "mask_mod must return one boolean, a scalar": {
        "mask_mod": lambda b, h, q, kv: jnp.arange(3) < q
    },
    "mask_mod must return one boolean; got": {"mask_mod": lambda b, h, q, kv: (kv < q, kv > q)},
    "mask_mod must be a function": {"mask_mod": jnp.ones((3, 3), bool)},
}


@pytest.mark.parametrize("message", BAD)
def test_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flash_attention(**inputs(), **BAD[message])


def test_explain_and_the_kernel_refuse_by_name() -> None:
    arrays = {n: x.astype(jnp.bfloat16) for n, x in inputs().items()}

    def sorted_score(score, b, h, q, kv):
        return score + jnp.sort(jnp.broadcast_to(q, 2))[0]

    explanation = explain(**arrays, score_mod=sorted_score)
    (reason,) = explanation.forward_reasons
    assert reason.startswith("score_mod: the primitive sort has no rule, at ")
    assert "test_masks.py" in reason
    assert "sorted_score" in reason
    assert reason in explanation.backward_reasons
    with pytest.raises(NotImplementedError, match="the primitive sort has no rule"):
        flash_attention(**arrays, score_mod=sorted_score, implementation="cute")


def test_the_kernel_refuses_gradients_that_it_cannot_give() -> None:
    arrays = {n: x.astype(jnp.bfloat16) for n, x in inputs().items()}

    def functions(slopes) -> dict:
        return {"score_mod": lambda score, b, h, q, kv: score * without_rule(slopes[h])}

    explanation = explain(**arrays, **functions(random(0, N)))
    assert explanation.forward == "cute"
    assert explanation.forward_reasons == ()
    assert explanation.backward == "xla"
    (reason,) = explanation.backward_reasons
    assert "the derivative of score_mod: the primitive lgamma has no rule, at " in reason

    def loss(slopes):
        return flash_attention(**arrays, **functions(slopes), implementation="cute").sum()

    with pytest.raises(NotImplementedError, match="the primitive lgamma has no rule"):
        jax.grad(loss)(random(0, N))


def test_memory_is_linear_in_the_lengths() -> None:
    """At 65,536 by 65,536 a byte per element would be 4 GiB."""

    def loss(query, key, slopes, ids):
        out = flash_attention(
            query,
            key,
            key,
            mask_mod=lambda b, h, q, kv: (ids[q] == ids[kv]) & (kv <= q),
            score_mod=lambda s, b, h, q, kv: s - slopes[h] * jnp.abs(q - kv),
            implementation="xla",
        )
        return jnp.sum(out.astype(jnp.float32))

    length = 65_536
    query = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.bfloat16)
    slopes = jax.ShapeDtypeStruct((4,), jnp.float32)
    ids = jax.ShapeDtypeStruct((length,), jnp.int32)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    compiled = gradient.lower(query, query, slopes, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 400 * 2**20


def test_shard_map() -> None:
    """Replicated arrays have summed gradients, whether varying axes are checked or not."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch, replicated = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    arrays = inputs(20, 24)
    slopes = random(0, N)

    def attend(query, key, value, slopes):
        return flash_attention(query, key, value, score_mod=alibi({"slopes": slopes}))

    def gradient(function):
        total = jax.grad(lambda slopes: jnp.sum(jnp.sin(function(*arrays.values(), slopes))))
        return jax.jit(total)(slopes)

    sharded = functools.partial(
        jax.shard_map,
        attend,
        mesh=mesh,
        in_specs=(batch, batch, batch, replicated),
        out_specs=batch,
    )
    np.testing.assert_allclose(gradient(sharded(check_vma=False)), gradient(attend), rtol=1e-5)
    np.testing.assert_allclose(gradient(sharded()), gradient(attend), rtol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 5), (2, 5, 0)], ids=str)
def test_nothing_to_attend(shape: tuple[int, int, int], implementation: str) -> None:
    batch, t, s = shape
    floating = {"query": jnp.ones((batch, t, N, H)), "key": jnp.ones((batch, s, K, H))}
    floating |= {"value": floating["key"], "slopes": random(0, N)}

    def attend(f, mask_mod):
        arrays = (f["query"], f["key"], f["value"])
        score_mod = alibi(f)
        return flash_attention(
            *arrays, mask_mod=mask_mod, score_mod=score_mod, implementation=implementation
        )

    for name in ("causal", "documents"):
        gradients = jax.grad(lambda f, name=name: jnp.sum(attend(f, MASKS[name])))(floating)
        assert np.all(attend(floating, MASKS[name]) == 0)
        for array in gradients.values():
            assert np.all(array == 0)


WINDOWS = {
    "causal": (lambda b, h, q, kv: kv <= q, {"is_causal": True}),
    "window": (lambda b, h, q, kv: jnp.abs(q - kv) <= 9, {"local_window_size": 9}),
    "both": (
        lambda b, h, q, kv: (kv <= q) & (q - kv < 20),
        {"is_causal": True, "local_window_size": (19, None)},
    ),
}


def checked_call(arrays: dict, **call):
    """The spec and operands of a call."""
    defaults = dict.fromkeys(inspect.signature(api.checked_call).parameters)
    defaults |= {"is_causal": False, "q_offset": 0}
    return api.checked_call(**defaults | arrays | call)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_written_as_a_function_takes_the_kernel_of_a_window(name, direction) -> None:
    function, same = WINDOWS[name]
    arrays = {n: x.astype(jnp.bfloat16) for n, x in inputs().items()}
    keys = []
    for call in ({"mask_mod": function}, same):
        spec, operands = checked_call(arrays, **call)
        assert registry.reasons_against(spec, operands, direction, "sm_90a") == []
        keys.append(registry.kernel_key(spec, operands, direction, "sm_90a", 132))
    assert keys[0] == keys[1]
    assert checked_call(arrays, mask_mod=function)[1].present() == ("query", "key", "value")


def test_what_is_no_window_stays_a_function() -> None:
    ids, unused = IDS, jnp.ones((B, 3))

    def mask(b, h, q, kv):
        return (unused[b, 0] > 0) & (kv <= q) & (ids[b, q] == ids[b, kv]) & (kv > q - 40)

    spec, operands = checked_call(inputs(), mask_mod=mask, local_window_size=(50, 3))
    assert spec.local_window_size == (39, 0)
    alone = checked_call(inputs(), mask_mod=lambda b, h, q, kv: mask(b, h, q, kv) | (kv < -1))[0]
    assert spec.mask_mod is not None
    assert len(operands.mask_mod_arrays) == 2
    assert alone.local_window_size is None
    dense = as_array(mask, S, T, 0)
    expected = results("reference", inputs(), lambda _: {"mask": dense})
    for implementation in ("xla", "reference"):
        actual = results(implementation, inputs(), lambda _: {"mask_mod": mask})
        assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize("bounds", [(None, -1), (-3, None), (-2, 5), (7, -2), (-4, 1)])
def test_windows_on_one_side_of_the_diagonal(bounds) -> None:
    """Both implementations, with offsets, against the dense mask."""
    left, right = bounds

    def mask(b, h, q, kv):
        shown = kv >= q - left if left is not None else kv >= 0
        return shown & (kv <= q + right) if right is not None else shown

    spec, _ = checked_call(inputs(), mask_mod=mask)
    assert (spec.local_window_size, spec.mask_mod) == (bounds, None)
    offset = jnp.asarray([7, -30])
    more = {"q_offset": offset, "local_window_size": (100, None)}
    dense = as_array(mask, S, T, offset)
    expected = results("reference", inputs(), lambda _: {"mask": dense} | more)
    for implementation in ("xla", "reference"):
        actual = results(implementation, inputs(), lambda _: {"mask_mod": mask} | more)
        assert_close(actual, expected, 2e-5)


def test_positions_too_far_for_the_analysis_keep_the_function() -> None:
    call = {"mask_mod": MASKS["causal"], "q_offset": analysis.POSITION_LIMIT}
    spec, _ = checked_call(inputs(3, 5), **call)
    assert spec.mask_mod is not None


@pytest.mark.parametrize(
    ("mask", "keys"),
    [
        (masks.causal & masks.sliding_window(127), "q - 127 <= kv < q + 1"),
        (masks.prefix_lm(64), "kv < max(q + 1, 64)"),
        (~masks.sliding_window(127), "kv < q - 127 or q + 1 <= kv"),
        (masks.dilated(9, 3), None),
    ],
)
def test_explain_says_which_keys_are_seen(mask, keys: str | None) -> None:
    explanation = explain(**inputs(), mask_mod=mask)
    assert explanation.keys == keys
    assert (keys or "not known to be intervals") in str(explanation)


def test_a_jitted_function_of_an_array_on_an_explicit_mesh_is_refused() -> None:
    types = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((2,), ("data",), types, devices=jax.devices("cpu")[:2])
    with jax.set_mesh(mesh):
        reach = jax.device_put(jnp.arange(4), jax.sharding.PartitionSpec())

        def trace(reach):
            return masks.trace_mask(lambda b, h, q, kv: kv < jax.jit(lambda x: x[h])(reach))[1]

        with pytest.raises(NotImplementedError, match="jitted functions of arrays that it closes"):
            jax.jit(trace)(reach)
