"""Plans in a file: what is read back is what was written, down to the name of the kernel."""

import functools
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import flash_attention, masks, plan
from jax_flashcute.block_mask import make_block_mask
from jax_flashcute.ffi import store
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.elements import program_of
from jax_flashcute.kernels.key import KernelKey
from jax_flashcute.kernels.nsa import NSAKernelKey
from jax_flashcute.recording import plans
from jax_flashcute.segments import segments_of_ids
from jax_flashcute.spec import AttentionSpec, Operands
from tests.cases import Case
from tests.user_functions import MASKS, SCORES

CASE = Case(seqlen_q=70, seqlen_k=90, group=3, head_dim=64, head_dim_v=64)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plan.ARCH_VARIABLE, "sm_90a:114")
    monkeypatch.delenv(plans.RECORD_VARIABLE, raising=False)
    monkeypatch.setattr(plans, "_recorded", set())


def shapes(*lengths) -> list[jax.ShapeDtypeStruct]:
    B, T, S = lengths or (2, 70, 90)
    query = jax.ShapeDtypeStruct((B, T, 6, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((B, S, 2, 64), jnp.bfloat16)
    return [query, key, key]


def collect(given, *, gradients: bool = False, **options) -> dict:
    """The plans of one call."""

    def call(query, key, value):
        return flash_attention(query, key, value, implementation="cute", **options)

    function = jax.grad(lambda *x: call(*x).astype(jnp.float32).sum()) if gradients else call
    with plans.collecting() as found:
        jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",))
    return found


def operations(function: masks.TracedFunction) -> list[str]:
    """What a kernel computes for it, without casts between equal dtypes."""
    equations = program_of(function)._equations
    return [
        e.primitive for e in equations if e.dtypes[0] != e.dtypes[-1] or "conv" not in e.primitive
    ]


def read_back(key: KernelKey, found: plans.RecordedPlan, path: Path):
    path.unlink(missing_ok=True)
    plans._append(path, found, key)
    (again,), calls = plans.read_plans(path)
    assert calls == []
    return again


@pytest.mark.parametrize("name", [*MASKS, *(name for name in SCORES if name != "gated")])
def test_functions_come_back(name: str, tmp_path: Path) -> None:
    """The same kernel is wanted, and the function gives the same on a block."""
    is_mask = name in MASKS
    if is_mask:
        function, arrays = masks.trace_mask(MASKS[name](CASE))
    else:
        function, arrays = masks.trace_score(SCORES[name](CASE), jnp.float32)
    option = {"mask_mod" if is_mask else "score_mod": (MASKS | SCORES)[name](CASE)}
    ((key, found),) = collect(shapes(), **option).items()
    again = read_back(key, found, tmp_path / "plans.toml")
    assert again.target == "sm_90a:114"
    assert repr(again.key()) == repr(key)
    assert again.key() == key

    spec = again.wanted.spec
    decoded = spec.mask_mod if is_mask else spec.score_mod
    if decoded is None:  # a window, or the identity
        assert key.elements is None or key.elements.mask_mod is None
        return
    original = found.wanted.spec.mask_mod if is_mask else found.wanted.spec.score_mod
    assert decoded.text == original.text
    assert operations(decoded) == operations(original)
    if original.text != function.text:  # a window was split off it
        return
    b, h, q, kv = (jnp.arange(n, dtype=jnp.int32) for n in (2, 6, 70, 90))
    axes = [b[:, None, None, None], h[:, None, None], q[:, None], kv]
    axes = [x.reshape((1,) * (4 - x.ndim) + x.shape) for x in axes]
    if not is_mask:
        axes.insert(0, jax.random.normal(jax.random.key(0), (2, 6, 70, 90)))
    np.testing.assert_array_equal(decoded(arrays, *axes), function(arrays, *axes))


def test_a_call_has_one_plan_for_each_pass(tmp_path: Path) -> None:
    options = {"is_causal": True, "local_window_size": (30, None), "logits_soft_cap": 3.0}
    found = collect(shapes(), gradients=True, **options)
    assert [key.kernel for key in found] == ["sm90_forward", "sm90_backward"]
    for key, one in found.items():
        assert read_back(key, one, tmp_path / "plans.toml").key() == key


def test_every_operand_comes_back(tmp_path: Path) -> None:
    """Those that no kernel takes yet, too."""
    B, T, S = 2, 70, 90

    def operands() -> Operands:
        ids = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
        return Operands(
            *(jnp.zeros(s.shape, s.dtype) for s in shapes()),
            q_offset=jnp.zeros(B, jnp.int32),
            mask_mod_arrays=(jnp.zeros((1, 3)), jnp.zeros((2, 5), jnp.uint8)),
            segment_ids=segments_of_ids(*ids, per_segment=False),
            block_mask=make_block_mask(masks.causal, B, 6, T, S, tile_m=32, tile_n=32),
        )

    given = jax.eval_shape(operands)
    one = plans.RecordedPlan("sm_90a:132", plans.Call(AttentionSpec(0.5), given, "fwd"))
    key = registry.kernel_key(AttentionSpec(0.5), Operands(*shapes()), "fwd", "sm_90a", 132)
    again = read_back(key, one, tmp_path / "plans.toml")
    assert again.wanted.spec == one.wanted.spec
    assert jax.tree.structure(again.wanted.operands) == jax.tree.structure(given)
    for got, expected in zip(
        jax.tree.leaves(again.wanted.operands), jax.tree.leaves(given), strict=True
    ):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)


def test_a_kernel_of_native_sparse_attention(tmp_path: Path) -> None:
    wanted = NSAKernelKey("nsa_compress", "bfloat16", 64, 72, block=32, has_counts=True)
    key = plan.make_nsa_plan(wanted)
    again = read_back(key, plans.RecordedPlan("sm_90a:132", wanted), tmp_path / "plans.toml")
    assert again.key() == key


def test_symbolic_lengths(tmp_path: Path) -> None:
    found = collect(shapes(*jax.export.symbolic_shape("b, t, s")), is_causal=True)
    ((key, one),) = found.items()
    assert read_back(key, one, tmp_path / "plans.toml").key() == key


def lower(**options) -> None:
    call = functools.partial(flash_attention, implementation="cute", **options)
    jax.jit(call).trace(*shapes()).lower(lowering_platforms=("cuda",))


def test_a_run_records_each_kernel_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "of" / "plans.toml"
    monkeypatch.setenv(plans.RECORD_VARIABLE, str(path))
    monkeypatch.setenv(store.CACHE_VARIABLE, str(tmp_path / "store"))
    monkeypatch.setattr(store, "_memory", {})
    monkeypatch.setattr(
        store, "_compile", lambda key: store.CompiledKernel(repr(key).encode(), key.arch)
    )
    lower(is_causal=True)
    lower(is_causal=True)
    plans._recorded.clear()  # as another process
    lower(is_causal=True)
    lower(is_causal=False)
    found, _ = plans.read_plans(path)
    assert [one.wanted.spec.is_causal for one in found] == [True, False]
    assert [one.key() in store._memory for one in found] == [True, True]


def test_what_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A derivative of its own; the run goes on."""
    ((key, one),) = collect(shapes(), score_mod=lambda s, *_: jax.nn.relu(s)).items()
    with pytest.warns(UserWarning, match="not recorded in .*custom_jvp_call"):
        plans._append(tmp_path / "plans.toml", one, key)
    with pytest.warns(UserWarning, match="not recorded in"):
        plans._append(Path("/proc/plans.toml"), *reversed(next(iter(collect(shapes()).items()))))


def test_collecting_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(key):
        raise AssertionError("the store was asked")

    monkeypatch.setattr(store, "get", refuse)
    assert len(collect(shapes(), is_causal=True, sinks=jnp.zeros(6))) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[plans]]\n", r"expected \[\[plan\]\] and \[\[call\]\] tables, got plans"),
        ("[[plan]\n", "plans.toml: "),
        ("plan = 3\n", r"expected \[\[plan\]\] tables, got plan = 3"),
        ("call = [3]\n", r"expected \[\[call\]\] tables, got call = \[3\]"),
        ("[call]\n", r"expected \[\[call\]\] tables, got call = {}"),
        ('[[plan]]\nid = "a"\n', "plan a: does not fit this version"),
        ('[[plan]]\nid = "a"\ntarget = "sm_90a"\nspec = 3\n', "plan a: does not fit this version"),
        (
            '[[plan]]\nid = "a"\ntarget = "sm_90a:132"\ndirection = "fwd"\n'
            "spec = {scale = 1.0, is_round = true}\noperands = {}\n",
            "plan a: does not fit this version .*is_round",
        ),
    ],
)
def test_files_that_are_no_plans(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plans.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        plans.read_plans(path)


def test_values_as_toml_writes_them() -> None:
    value = {
        "text": 'a "quote"\n\\ é',
        "numbers": [1, -2.5, float("inf"), True, {}],
        "t": {"x": []},
    }
    assert tomllib.loads(f"value = {plans._toml(value)}") == {"value": value}


@pytest.mark.parametrize("mapped", [False, True])
def test_one_kernel_for_the_gradients_of_bias_and_of_arrays(mapped: bool) -> None:
    query, key, value = shapes()
    bias = jax.ShapeDtypeStruct((1, 6, 1, 90), jnp.bfloat16)
    slopes = jax.ShapeDtypeStruct((6,), jnp.float16)

    def total(query, key, value, bias, slopes):
        out = flash_attention(
            *(query, key, value),
            bias=bias,
            score_mod=lambda score, b, h, q, kv: score - slopes[h] * jnp.abs(q - kv),
            implementation="cute",
        )
        return out.astype(jnp.float32).sum()

    gradient = jax.grad(total, argnums=range(5))
    given = [query, key, value, bias, slopes]
    if mapped:
        gradient = jax.vmap(gradient, in_axes=(0, 0, 0, None, None))
        given = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in given[:3]] + given[3:]
    with plans.collecting() as found:
        lowered = jax.jit(gradient).trace(*given).lower(lowering_platforms=("cuda",))
    assert sorted(key.direction for key in found) == ["bwd", "fwd"]
    results = [(x.shape[1:] if mapped else x.shape, x.dtype) for x in lowered.out_info]
    assert results == [
        ((x.shape[1:] if mapped and i < 3 else x.shape), x.dtype) for i, x in enumerate(given)
    ]


@pytest.mark.parametrize("by", [("bias",), ("slopes",), (), ("bias", "slopes")])
def test_nothing_is_summed_that_nobody_asks_for(by: tuple[str, ...]) -> None:
    query, key, value = shapes()
    given = {"bias": jnp.zeros((1, 6, 1, 90)), "slopes": jnp.zeros(6)}

    def total(query, asked):
        arrays = given | asked
        out = flash_attention(
            *(query, key, value),
            bias=arrays["bias"],
            score_mod=lambda score, b, h, q, kv: score - arrays["slopes"][h] * jnp.abs(q - kv),
            implementation="cute",
        )
        return out.astype(jnp.float32).sum()

    key, value = (jnp.zeros(x.shape, x.dtype) for x in (key, value))
    asked = {name: given[name] for name in by}
    with plans.collecting() as found:
        gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
        gradient.trace(query, asked).lower(lowering_platforms=("cuda",))
    (backward,) = (key for key in found if key.direction == "bwd")
    names = {"bias": "bias", "slopes": "score_mod_arrays"}
    assert set(backward.elements.constants) == {names[n] for n in given if n not in by}
    ranks = {"bias": 4, "slopes": 2}
    assert backward.elements.summed_ranks == [ranks[n] for n in given if n in by]
