"""The Hopper forward with masks and scores by element, in simulation, against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import analysis, masks, reference
from jax_flashcute.ffi.call import other_inputs
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.config.sm90 import FwdConfig
from jax_flashcute.kernels.config.sm100 import FwdConfigSm100
from jax_flashcute.kernels.key import KernelKey
from jax_flashcute.spec import AttentionSpec, Operands
from tests.cases import Case
from tests.simulator import simulate
from tests.simulator.test_forward_features import FIRST_KEYS, NUM_SMS, compiled, sized
from tests.user_functions import MASKS, SCORES


def operands_of(case: Case, dtype: str, mask_mod=None, score_mod=None):
    """The spec and the operands of a call, as ``flash_attention`` makes them."""
    arrays = case.arrays(jnp.dtype(dtype), poison=True)
    if "sinks" in arrays:
        arrays["sinks"] = arrays["sinks"].astype(jnp.float32)[None]
    mask_mod, mask_arrays = masks.trace_mask(mask_mod) if mask_mod else (None, ())
    score_mod, score_arrays = masks.trace_score(score_mod, jnp.float32) if score_mod else (None, ())
    spec = AttentionSpec(
        case.head_dim**-0.5,
        case.causal,
        case.window,
        case.soft_cap,
        mask_mod=mask_mod,
        score_mod=score_mod,
    )
    indexed = mask_mod is not None or score_mod is not None
    operands = Operands(
        **arrays,
        batch_index=jnp.arange(case.batch, dtype=jnp.int32)[::-1] if indexed else None,
        mask_mod_arrays=mask_arrays,
        score_mod_arrays=score_arrays,
    )
    return spec, operands


def widened(operands: Operands) -> Operands:
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x, operands
    )


def check(
    case: Case,
    mask_mod=None,
    score_mod=None,
    dtype: str = "bfloat16",
    *,
    arch: str = "sm_90a",
    config: FwdConfig | FwdConfigSm100 | None = None,
    num_sms: int = NUM_SMS,
    bias_dtype: str = "float32",
    **how,
) -> KernelKey:
    """Simulate the kernel that a call gets and compare with the dense reference.

    Args:
      config: instead of the configuration that a call gets.
    """
    spec, operands = operands_of(case, dtype, mask_mod, score_mod)
    if operands.bias is not None:
        operands = dataclasses.replace(operands, bias=operands.bias.astype(bias_dtype))
    assert not registry.reasons_against(spec, operands, "fwd", arch)
    key = registry.kernel_key(spec, operands, "fwd", arch, num_sms)
    # Some masks turn out to be one interval of keys, which is none of single scores.
    assert key.elements is not None or mask_mod is not None
    if config is not None:
        assert not config.reasons_invalid(case.head_dim, case.head_dim_v)
        key = dataclasses.replace(key, config=config)
    wide = Operands(
        **{n: x for n, x in vars(widened(operands)).items() if n not in ("score_mod_arrays",)},
        score_mod_arrays=operands.score_mod_arrays,
    )
    want = jax.jit(functools.partial(reference.attention, spec))(wide)
    inputs = [operands.query, operands.key, operands.value]
    inputs += other_inputs(key, spec, operands)
    rows = (case.batch, case.seqlen_q, case.q_heads)
    outputs = [((*rows, case.head_dim_v), jnp.dtype(dtype)), (rows, np.dtype(np.float32))]
    outputs += [(s, np.dtype(n)) for s, n in registry.scratch_shapes(key, operands)]
    out, lse, *_ = simulate(
        compiled(key), *(np.asarray(x) for x in inputs), outputs=outputs, **how
    )  # fmt: skip
    np.testing.assert_allclose(out.astype(np.float32), want.out, atol=0.02, rtol=0.02)
    np.testing.assert_allclose(lse, want.lse, atol=2e-4, rtol=1e-5)
    empty = (np.asarray(want.out) == 0).all(-1)
    assert (out[empty] == 0).all()
    return key


EVERYTHING = {"batch": 3, "causal": True, "offset": True, "lengths": True}

CASES = {
    "soft_cap": sized(64, soft_cap=1.5, causal=True),
    "bias_everything": sized(64, bias="bnts", kv_heads=2, **EVERYTHING),
    "bias_keys": sized(64, bias="bs", batch=2),
    "bias_keys_in_tiles_of_112": sized(192, 128, bias="bs", batch=2, lengths=True),
    "bias_heads_packed": sized(64, bias="n", group=3, seqlen_q=7),
    "mask": sized(64, mask="nts", group=3, kv_heads=2),
    "mask_keys_packed": sized(64, mask="bts", batch=2, group=7, seqlen_q=5, seqlen_k=140),
    "sinks": sized(128, sinks=True, group=3, **EVERYTHING),
    "sinks_packed": sized(64, sinks=True, group=7, seqlen_q=3, lengths=True, batch=3),
    "eight_rows": sized(
        *(72, 40),
        **EVERYTHING,
        group=4,
        seqlen_q=2,
        seqlen_k=600,
        soft_cap=2.0,
        bias="ns",
        mask="bt",
        sinks=True,
    ),
    "everything": sized(
        *(72, 40), **EVERYTHING, window=(90, 3), soft_cap=2.0, bias="ns", mask="bt", sinks=True
    ),
}


@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items()])
def test_operand(case: Case):
    check(case)


PAIRS = {"seqlen_q": 250, "seqlen_k": 456}
STAGED = {
    "64": (sized(64, bias="bnts", group=3, **EVERYTHING), "float32"),
    "64_six_rows": (sized(64, bias="nts", lengths=True, seqlen_q=6, seqlen_k=608), "bfloat16"),
    "64_union": (sized(64, bias="ts", mask_mod=FIRST_KEYS, seqlen_k=504), "float16"),
    "128_pairs": (sized(128, bias="nts", group=2, causal=True, **PAIRS), "float32"),
    "128_pairs_that_share": (sized(128, bias="bts", group=4, batch=2, **PAIRS), "bfloat16"),
    "192_128": (sized(192, 128, bias="ts", lengths=True, batch=2, **PAIRS), "bfloat16"),
    "256": (sized(256, bias="bts", window=(90, 20), soft_cap=2.0, mask="bs"), "float32"),
}


@pytest.mark.parametrize(
    ("case", "bias_dtype"), [pytest.param(*call, id=name) for name, call in STAGED.items()]
)
def test_bias_in_shared_memory(case: Case, bias_dtype: str):
    """Over queries and keys, with tiles of keys and of work that follow each other."""
    how = {"timing": "shuffled", "warps": "adversarial"}
    key = check(case, case.mask_mod, bias_dtype=bias_dtype, num_sms=4, **how)
    assert key.config.bias_itemsize == jnp.dtype(bias_dtype).itemsize
    assert key.config.cluster == (2 if case.group % 2 == 0 else 1)


@pytest.mark.parametrize("axes", ["ts", "nts"])
def test_table_of_queries_and_keys(axes: str):
    """A score that adds its elements and nothing else is served as a bias."""
    sizes = {"seqlen_q": 380, "seqlen_k": 456, "group": 3, "kv_heads": 2, "batch": 2}
    case = sized(64, lengths=True, causal=True, **sizes)
    shape = (case.q_heads,) * ("n" in axes) + (case.seqlen_q, case.seqlen_k)
    table = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.bfloat16)
    if axes == "ts":
        key = check(case, None, lambda score, b, h, q, kv: score + table[q, kv])
    else:
        key = check(case, None, lambda score, b, h, q, kv: table[h, q, kv] + score)
    assert (key.config.bias_itemsize, key.elements.table) == (2, 0)


@pytest.mark.parametrize("seqlen_k", [302, 301])
def test_bias_whose_rows_tma_cannot_read(seqlen_k: int):
    key = check(sized(64, bias="ts", seqlen_k=seqlen_k))
    assert key.config.bias_itemsize == 0


# Code for each element of a tile is most of a compile: a function that users write is tried with
# half the elements a thread.  The other tests have the tiles that calls get.
SMALL_TILES = FwdConfig(2, 64, 2, takes_turns=False)
SMALL = sized(64, group=3, kv_heads=2, seqlen_q=70, seqlen_k=140, batch=2, offset=True)


LONG = ("by_score", "decays")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in SCORES]
)
def test_score(name: str):
    check(SMALL, score_mod=SCORES[name](SMALL), config=SMALL_TILES)


@pytest.mark.parametrize("name", MASKS)
def test_mask(name: str):
    check(SMALL, mask_mod=MASKS[name](SMALL), config=SMALL_TILES)


def table_of_scores(case: Case, dtype: str, keys: int, index):
    """A score that adds elements of (1, T, keys), and of the same in one row, as ``index`` has it.

    Beyond arrays, indices are those of the last key.
    """
    rng = np.random.default_rng(keys)
    table = jnp.asarray(rng.standard_normal((case.q_heads, case.seqlen_q, keys)), dtype)
    flat = table[0].reshape(-1)

    def score_mod(score, b, h, q, kv):
        row = jnp.clip(q, 0, case.seqlen_q - 1)
        found = flat[row * keys + kv] if index is None else table[h, row, index(kv)]
        return score + found.astype(jnp.float32)

    return score_mod


def table_of_booleans(case: Case):
    rng = np.random.default_rng(case.seqlen_k)
    table = jnp.asarray(rng.random((case.seqlen_q, case.seqlen_k)) < 0.7)
    ids = jnp.asarray(rng.integers(0, 3, case.seqlen_k), jnp.int32)
    return lambda b, h, q, kv: table[q, kv] | (ids[q] == ids[kv])


SQUARE = {"seqlen_q": 70, "seqlen_k": 140}
TABLES = {
    "even": (sized(64, **SQUARE), "float32", 140, lambda kv: kv, 4),
    "even_of_halves": (sized(64, **SQUARE), "bfloat16", 140, lambda kv: kv, 4),
    "odd_keys": (sized(64, seqlen_q=70, seqlen_k=139), "float32", 142, lambda kv: kv, 2),
    "odd_rows": (sized(64, seqlen_q=70, seqlen_k=139), "bfloat16", 139, lambda kv: kv, 1),
    "next": (sized(64, group=2, batch=2, **SQUARE), "float32", 144, lambda kv: kv + 1, 1),
    "next_pair": (sized(64, group=2, causal=True, **SQUARE), "float32", 140, lambda kv: kv + 2, 2),
    "flat": (sized(64, lengths=True, batch=2, **SQUARE), "float32", 140, None, 4),
    "short": (sized(64, **SQUARE), "bfloat16", 96, lambda kv: jnp.maximum(kv, 0), 8),
}


@pytest.mark.parametrize("name", TABLES)
def test_table_of_scores(name: str):
    """Read in pairs where it is proven that they are aligned, and within arrays everywhere."""
    case, dtype, keys, index, width = TABLES[name]
    key = check(case, None, table_of_scores(case, dtype, keys, index), config=SMALL_TILES)
    program = analysis.analyse(key.elements.score_mod.jaxpr)
    assert analysis.loads(program)[-1].width == width


@pytest.mark.parametrize("keys", [140, 139])
def test_table_of_booleans(keys: int):
    case = sized(64, seqlen_q=70, seqlen_k=keys, batch=2)
    check(case, table_of_booleans(case), config=SMALL_TILES)


@pytest.mark.parametrize("keys", [140, 139])
def test_arrays_by_key(keys: int):
    """A bias and a mask in pairs where keys are even in number, and one by one elsewhere."""
    case = sized(64, seqlen_q=70, seqlen_k=keys, batch=2, bias="bts", mask="ts", lengths=True)
    key = check(case, config=SMALL_TILES)
    pairs = [array.in_pairs for array in (key.elements.bias, key.elements.mask)]
    assert pairs == [keys % 2 == 0] * 2


PACKED = sized(64, group=7, kv_heads=2, seqlen_q=5, seqlen_k=300, **EVERYTHING)


@pytest.mark.parametrize("case", [PACKED, sized(128, seqlen_q=150, **EVERYTHING)])
def test_together(case: Case):
    check(case, MASKS["documents"](case), SCORES["relative_bias"](case))


def all_that_is_added(case: Case):
    """Terms of a row, of a key and of both by a step for each key, and a key that is hidden."""
    rng = np.random.default_rng(0)
    slopes = jnp.asarray(rng.standard_normal((case.q_heads, case.seqlen_q)) / 8, jnp.float32)
    keys = rng.standard_normal((case.batch, case.seqlen_k))
    keys[:, -150:-60], keys[:, 130:] = -1e9, np.finfo(np.float32).min
    keys[:, 2::7], keys[:, 20::30] = -np.inf, np.finfo(np.float32).min
    keys = jnp.asarray(keys, jnp.float32)
    heads = jnp.asarray(rng.standard_normal(case.q_heads), jnp.float32)

    def score_mod(score, b, h, q, kv):
        row = jnp.clip(q, 0, case.seqlen_q - 1)
        return 1.5 + (score - slopes[h, row] * (row - kv)) + keys[b, kv] - heads[h]

    return score_mod


ADDED_CASES = {
    "64": sized(64, group=3, bias="bs", seqlen_k=420, **EVERYTHING),
    "packed": sized(64, group=7, seqlen_q=9, seqlen_k=300, bias="bs", lengths=True, batch=3),
    "six_rows": sized(64, group=2, seqlen_q=3, seqlen_k=600, bias="bs", lengths=True, batch=3),
    "128": sized(128, group=2, bias="nt", seqlen_q=300, seqlen_k=500, causal=True),
}
SLOW_ADDED_CASES = {"256": sized(256, bias="ns", seqlen_k=200, mask="ts")}


@pytest.mark.parametrize(
    ("head_dim", "packed"),
    [(64, False), (128, False), pytest.param(64, True, marks=pytest.mark.slow)],
)
def test_terms_that_tiles_have_in_common(head_dim: int, packed: bool):
    """Distances are clipped in most tiles, and not in all."""
    shape = {"group": 7, "seqlen_q": 5} if packed else {"seqlen_q": 260}
    case = sized(head_dim, seqlen_k=700, **shape, **EVERYTHING)
    key = check(case, None, SCORES["relative_bias"](case), num_sms=5, warps="adversarial")
    assert key.elements.added_kinds(key.pack_gqa) == {"tile"}


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(c, id=n) for n, c in ADDED_CASES.items()),
        *(pytest.param(c, id=n, marks=pytest.mark.slow) for n, c in SLOW_ADDED_CASES.items()),
    ],
)
def test_terms_that_are_added(case: Case):
    """By a product of their own, with tiles of keys and of work that follow each other."""
    key = check(
        *(case, None, all_that_is_added(case)), num_sms=3, timing="shuffled", warps="adversarial"
    )
    assert key.elements.added_kinds(key.pack_gqa) == {"row", "affine", "key"}


def test_terms_beyond_scores():
    """NaN is added to rows that see no key, and much more than scores can hold to the others."""
    case = sized(64, seqlen_q=70, seqlen_k=1)
    rows = jnp.asarray(np.where(np.arange(70) % 2, 1e9, np.nan), jnp.float32)
    keys = jnp.full(1, 300.0, jnp.float32)
    key = check(
        case,
        lambda b, h, q, kv: q % 2 == 1,
        lambda score, b, h, q, kv: score + rows[q] + keys[kv],
    )
    assert key.elements.added_kinds(key.pack_gqa) == {"row", "key"}


def test_slopes_that_are_numbers():
    """Known while tracing, and not to be rounded for it; -inf hides some rows."""

    def score_mod(score, b, h, q, kv):
        hidden = jnp.where(q % 3 == 0, -jnp.inf, 0.0)
        return score + (hidden + 0.01 * (kv - q).astype(jnp.float32))

    key = check(sized(64, seqlen_q=70, seqlen_k=512), None, score_mod)
    assert key.elements.added_kinds(key.pack_gqa) == {"affine"}


def test_terms_by_distance():
    """Slopes that turn at the diagonal and a table near it, beside a slope and terms of keys."""
    sizes = {"seqlen_q": 150, "seqlen_k": 520, "batch": 2}
    case = sized(64, **sizes, offset=True, lengths=True, window=(200, 150))
    rng = np.random.default_rng(0)
    slopes = jnp.asarray(rng.uniform(-0.3, 0.3, case.q_heads), jnp.float32)
    table = jnp.asarray(rng.standard_normal((case.q_heads, 21)), jnp.float32)
    keys = jnp.asarray(rng.standard_normal((2, 520)), jnp.float32)

    def score_mod(score, b, h, q, kv):
        near = table[h, jnp.clip(q - kv, -10, 10) + 10]
        return score - slopes[h] * jnp.abs(q - kv) + near + 0.02 * slopes[h] * kv + keys[b, kv]

    key = check(
        *(case, None, score_mod), config=SMALL_TILES, num_sms=3, timing="shuffled",
        warps="adversarial",
    )  # fmt: skip
    assert key.elements.added_kinds(key.pack_gqa) == {"bent", "tile", "affine", "key"}


@pytest.mark.parametrize("name", ["two_tables", "clipped_to_bool"])
def test_terms_of_few_values(name: str):
    """A term of the distance beside one that is not, and one that changes within its bounds."""
    case = sized(64, seqlen_q=64, seqlen_k=256)
    table = jnp.asarray(3 * np.random.default_rng(1).standard_normal(300), jnp.float32)

    def two_tables(score, b, h, q, kv):
        near = jnp.sqrt(jnp.abs(q - kv).astype(jnp.float32))
        return score - 0.1 * near + table[jnp.clip(kv - 2 * q + 5, 0, 200)]

    def clipped_to_bool(score, b, h, q, kv):
        return score + table[jnp.clip(q - kv, -1, 1).astype(bool).astype(jnp.int32)]

    check(case, score_mod={"two_tables": two_tables, "clipped_to_bool": clipped_to_bool}[name])


# Few queries and many keys: the keys are divided among blocks, and a sink belongs to all of them.
SPLIT = sized(64, group=7, seqlen_q=3, seqlen_k=1100, kv_heads=2, **EVERYTHING)
ONE_SLAB = FwdConfig(1, 64, 4, takes_turns=False)
SPLIT_CASES = {
    "sinks": (sized(64, group=8, seqlen_q=1, seqlen_k=1100, lengths=True, batch=4, sinks=True),),
    "score": (dataclasses.replace(SPLIT, sinks=True, soft_cap=3.0), None, "relative_bias"),
}
SLOW_SPLIT_CASES = {
    "mask": (SPLIT, "documents"),
    "mask_score": (dataclasses.replace(SPLIT, sinks=True), "boolean_table", "alibi"),
    "arrays": (dataclasses.replace(SPLIT, bias="bns", mask="bnts"),),
    "window": (dataclasses.replace(SPLIT, seqlen_k=1700, window=(1000, 20), sinks=True),),
}


@pytest.mark.parametrize(
    "call",
    [
        *(pytest.param(c, id=n) for n, c in SPLIT_CASES.items()),
        *(pytest.param(c, id=n, marks=pytest.mark.slow) for n, c in SLOW_SPLIT_CASES.items()),
    ],
)
def test_split_kv(call: tuple):
    case, *names = call
    functions = [f[n](case) if n else None for f, n in zip((MASKS, SCORES), names, strict=False)]
    key = check(case, *functions, config=ONE_SLAB, num_sms=32, timing="shuffled")
    assert key.split_kv
