"""One list of calls, run by the kernels of whatever is at hand: results to be laid side by side.

    python -m tests.simulator.agreement --arch sm_100a --out FILE   # in simulation, on any machine
    python -m tests.simulator.agreement --arch sm_90a --gpu --out FILE   # on a Hopper GPU
    python -m tests.simulator.agreement --table   # writes docs/agreement.md of the two

Calls that ``FILE`` has and that are not run again stay, each with its commit.

Every call has fixed seeds and runs forward and, where a kernel has it, backward, from the forward's
own results.  The file holds samples of each result, at places drawn by a fixed seed, and from a
simulated run the float64 reference's there, so that a GPU's time is not spent on it.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashcute import masks, reference
from jax_flashcute.ffi import store
from jax_flashcute.ffi.call import other_inputs
from jax_flashcute.ffi.runtime import CALL_TARGET, register_call_target
from jax_flashcute.kernels import description, registry
from jax_flashcute.kernels.config.sm100 import BwdConfigSm100
from jax_flashcute.kernels.elements import summed_arrays
from jax_flashcute.kernels.key import Direction, KernelKey
from jax_flashcute.spec import AttentionSpec, Operands
from tests.conftest import commit
from tests.simulator.agreement_table import encoded, error, write_page
from tests.simulator.compiled import kernel_of
from tests.simulator.simulation import simulate
from tests.simulator.test_block_lists import holes, odd, random_lists
from tests.simulator.test_forward_features import FIRST_KEYS, THREE
from tests.simulator.test_forward_paged import CAPPED, Call
from tests.simulator.test_forward_paged import FIRST_KEYS as FIRST_KEYS_IN_PAGES
from tests.simulator.test_forward_segments import PACKED, call_of

NUM_SMS = 16
MAIN = ("query", "key", "value")
LENGTHS = (2, 150, 280)
KEYS = {"key_value_seq_lengths": jnp.array([133, 280])}
ROWS = {"query_seq_lengths": jnp.array([150, 70])}


def drawn(*shape: int, high: int | None = None) -> jax.Array:
    """Standard normal numbers, or integers below ``high``."""
    rng = np.random.default_rng(len(shape))
    return jnp.asarray(rng.standard_normal(shape) if high is None else rng.integers(0, high, shape))


def alibi(score, b, h, q, kv):
    return score - 0.125 * (h + 1) * jnp.abs(q - kv)


def relative(table: jax.Array):
    return lambda score, b, h, q, kv: score + table[h, jnp.clip(kv - q, -32, 32) + 32]


CALLS: dict[str, tuple[tuple[int, int, int], dict]] = {
    "full": (LENGTHS, {"head_dim": 128}),
    "causal": (LENGTHS, {"head_dim": 128, "heads": (3, 1), "is_causal": True}),
    "causal, groups of 7, offsets": (
        (2, 70, 200),
        {"heads": (7, 1), "is_causal": True, "q_offset": jnp.array([130, -20])},
    ),
    "causal, float16": (LENGTHS, {"is_causal": True, "dtype": jnp.float16}),
    "window": (LENGTHS, {"local_window_size": (40, 10), "q_offset": jnp.array([130, -20])}),
    "lengths": (LENGTHS, {"heads": (3, 1), **KEYS, **ROWS}),
    "soft cap": (LENGTHS, {"logits_soft_cap": 1.5, "is_causal": True}),
    "sinks": (LENGTHS, {"heads": (3, 1), "sinks": drawn(3), "is_causal": True, **KEYS}),
    "bias": (LENGTHS, {"heads": (3, 1), "bias": drawn(1, 3, 150, 280).astype(jnp.float32)}),
    "mask": (LENGTHS, {"mask": drawn(2, 1, 150, 280, high=2).astype(bool)}),
    "ALiBi": (LENGTHS, {"heads": (3, 1), "score_mod": alibi, "is_causal": True}),
    "relative bias": (LENGTHS, {"heads": (3, 1), "score_mod": relative(drawn(3, 65))}),
    "gradients of a bias and of a table": (
        LENGTHS,
        {
            "heads": (3, 1),
            "bias": drawn(1, 1, 150, 280).astype(jnp.float32),
            "score_mod": relative(drawn(3, 65)),
        },
    ),
    "documents by ids": (
        (2, 200, 200),
        {"mask_mod": masks.documents(drawn(2, 200, high=3)), "is_causal": True},
    ),
    "documents by offsets": (
        (1, 250, 250),
        {"mask_mod": masks.documents_by_offsets(jnp.array([0, 70, 75, 180]), 250)},
    ),
    "chunks": (LENGTHS, {"mask_mod": masks.chunked(60), "head_dim": 128}),
    "first keys and a window": (LENGTHS, {"mask_mod": FIRST_KEYS, "heads": (3, 1), **KEYS}),
    "three intervals": (LENGTHS, {"mask_mod": THREE, "q_offset": jnp.array([130, 60])}),
    "compress_factor 4": (
        (2, 300, 75),
        {"mask_mod": masks.compressed_causal(4), "heads": (7, 1)},
    ),
    "segments": ((2, 300, 300), {"is_causal": True, **PACKED}),
    "scattered segments": (
        (1, 150, 290),
        {
            "segment_ids": (drawn(1, 150, high=3), drawn(1, 290, high=3)),
            "positions": "segment",
            "is_causal": True,
        },
    ),
    "lists of tiles": (
        (2, 300, 400),
        {"mask_mod": odd, "heads": (3, 1), "block_mask": random_lists((2, 300, 400), 1, 3)},
    ),
    "a mask in bits": (
        LENGTHS,
        {"packed_mask": drawn(2, 1, 150, 9, high=2**32).astype(jnp.uint32)},
    ),
    "split-KV, groups of 7": (
        (2, 3, 1300),
        {"heads": (7, 1), "is_causal": True, "q_offset": jnp.array([1297, 700])},
    ),
    "split-KV, first keys": (
        (2, 3, 1300),
        {"heads": (7, 1), "mask_mod": FIRST_KEYS, "q_offset": jnp.array([1297, 700])},
    ),
    "head_dim 256": (LENGTHS, {"head_dim": 256, "is_causal": True}),
    "deterministic": (LENGTHS, {"head_dim": 128, "is_causal": True, "deterministic": True}),
    "several pairs of blocks": (
        (1, 260, 900),
        {"heads": (2, 1), "head_dim": 128, "is_causal": True, "q_offset": jnp.array([640])},
    ),
    "head_dim 96, a window": (LENGTHS, {"head_dim": 96, "local_window_size": (90, 20)}),
    "head_dim 192, values 128": (
        LENGTHS,
        {"heads": (3, 1), "head_dim": 192, "head_dim_v": 128, "is_causal": True, **KEYS},
    ),
    "head_dim 256, first keys and a window": (
        LENGTHS,
        {"head_dim": 256, "mask_mod": FIRST_KEYS, "heads": (3, 1), **KEYS},
    ),
    "head_dim 256, segments": ((2, 300, 300), {"head_dim": 256, "is_causal": True, **PACKED}),
    "first keys within segments": (
        (2, 300, 300),
        {"mask_mod": FIRST_KEYS, "heads": (3, 1), **PACKED},
    ),
    "lists of tiles of 256 keys": (
        (2, 300, 600),
        {
            "mask_mod": odd,
            "heads": (3, 1),
            "head_dim": 128,
            "block_mask": random_lists((2, 300, 600), 1, 3, (128, 256)),
        },
    ),
    "lists made in the call": (
        (2, 200, 300),
        {"mask_mod": holes, "heads": (3, 1), "head_dim": 128, "block_mask": "auto"},
    ),
    "head_dim 256, lists made in the call": (
        (1, 200, 300),
        {"mask_mod": holes, "heads": (2, 1), "head_dim": 256, "block_mask": "auto"},
    ),
}
OF_ARRAYS = ("gradients of a bias and of a table",)
"""The calls whose bias and arrays of scores have gradients."""
PAGES = {
    "pages of 16": Call(16, (0, 7, 157), seqlen_q=70, queries=(3, 1, 70), group=3),
    "pages of 4": Call(4, (300, 5), 72, 72, seqlen_q=5, group=7),
    "pages of 16, split-KV": Call(16, (1101, 0, 15), 128, 128, group=7),
    "pages of 1, first keys": Call(1, (0, 133, 500), seqlen_q=5, group=3, spec=FIRST_KEYS_IN_PAGES),
    "pages of 64, a sink, soft cap": Call(
        64, (65, 300), seqlen_q=9, spec=CAPPED, group=2, sinks=True
    ),
}


@functools.cache
def arguments(name: str) -> tuple[AttentionSpec, Operands]:
    """A call as the kernels take it."""
    if name in PAGES:
        return PAGES[name].spec, PAGES[name].operands()
    lengths, given = CALLS[name]
    spec, operands = call_of(lengths, **given)
    if name in OF_ARRAYS:
        return spec, operands
    return dataclasses.replace(spec, constants=("bias", "score_mod_arrays")), operands


def directions(name: str) -> tuple[Direction, ...]:
    return ("fwd",) if name in PAGES else ("fwd", "bwd")


@functools.cache
def key_of(name: str, direction: Direction, arch: str) -> KernelKey:
    """The kernel of a call; where it may make lists it does, however few its scores."""
    spec, operands = arguments(name)
    reasons = registry.reasons_against(spec, operands, direction, arch)
    if reasons:
        raise NotImplementedError(f"{name}: {'; '.join(reasons)}")
    with mock.patch.multiple(registry, LEAST_SCORES_FOR_LISTS=1, LEAST_HEADS_FOR_A_LIST=1):
        return registry.kernel_key(spec, operands, direction, arch, NUM_SMS)


def features(name: str, arch: str) -> list[str]:
    """What the kernels of a call have that those of dense calls do not, in words."""
    found: dict[str, list[str]] = {}
    directions_of = directions(name)
    for direction in directions_of:
        for feature in _features(key_of(name, direction, arch), arguments(name)[1]):
            found.setdefault(feature, []).append({"fwd": "forward", "bwd": "backward"}[direction])
    return [
        feature if len(where) == len(directions_of) else f"{where[0]}: {feature}"
        for feature, where in found.items()
    ]


def _features(key: KernelKey, operands: Operands) -> list[str]:
    config, elements, bounds = key.config, key.elements, key.row_bounds
    intervals = max(len(key.union), bounds.intervals if bounds is not None else 0)
    copies = description.page_copies(key)
    blackwell_backward = isinstance(config, BwdConfigSm100)
    present = {
        "pairs of blocks": blackwell_backward and config.cta_group == 2,
        "a kernel for each gradient": blackwell_backward and config.passes != (),
        "deterministic": key.direction == "bwd" and config.deterministic,
        "heads share a tile": key.pack_gqa,
        "split-KV": key.split_kv,
        f"pages by {copies}": copies is not None,
        "lists given": key.has_lists and operands.block_mask is not None,
        "lists made in the call": key.has_lists and operands.block_mask is None,
        "bounds of rows in arrays": bounds is not None,
        "ids are compared": bounds is not None and bounds.compares_ids,
        f"{intervals} intervals": intervals > 1,
        "a mask in bits": key.packed_mask is not None,
        "scores are changed": elements is not None and elements.changes_scores,
        "scores are hidden one by one": elements is not None and elements.hides,
        "sinks": elements is not None and elements.sinks,
        "gradients of arrays": key.direction == "bwd" and bool(elements and elements.summed_ranks),
    }
    return [feature for feature, is_present in present.items() if is_present]


def results(name: str, run: Callable, arch: str) -> dict[str, np.ndarray]:
    """O, LSE and gradients of a call; ``run``: a kernel, its inputs and outputs to results."""
    spec, operands = arguments(name)
    dtype = operands.query.dtype
    main = [getattr(operands, n) for n in MAIN]
    key = key_of(name, "fwd", arch)
    rows = operands.query.shape[:3]
    outputs = [((*rows, operands.value.shape[3]), dtype), (rows, np.dtype(np.float32))]
    out, lse = run(key, [*main, *other_inputs(key, spec, operands)], outputs)[:2]
    found = {"O": out, "LSE": lse}
    if "bwd" in directions(name):
        key = key_of(name, "bwd", arch)
        inputs = [*main, out, lse, *cotangents(name), *other_inputs(key, spec, operands)]
        outputs = [(x.shape, dtype) for x in main]
        outputs += [(x.shape, np.dtype(np.float32)) for x in differentiated(spec, operands)]
        found |= dict(zip(gradients_of(name), run(key, inputs, outputs), strict=False))
    return {n: np.asarray(x).astype(np.float64) for n, x in found.items()}


def differentiated(spec: AttentionSpec, operands: Operands) -> list:
    """A bias and arrays of a score that have gradients."""
    biases, arrays = summed_arrays(spec, operands)
    return [*biases, *arrays]


def gradients_of(name: str) -> tuple[str, ...]:
    """What a call's backward gives."""
    biases, arrays = summed_arrays(*arguments(name))
    of_arrays = (f"darray {i}" for i in range(len(arrays)))
    return ("dQ", "dK", "dV", *("dbias" for _ in biases), *of_arrays)


def cotangents(name: str) -> tuple[jax.Array, jax.Array]:
    """dO and dLSE, zero beyond the lengths."""
    _, operands = arguments(name)
    B, T, N, _ = operands.query.shape
    rng = np.random.default_rng(1)
    d_out = rng.standard_normal((B, T, N, operands.value.shape[3]))
    d_lse = rng.standard_normal((B, T, N))
    if operands.query_seq_lengths is not None:
        inside = np.arange(T)[None] < np.asarray(operands.query_seq_lengths)[:, None]
        d_out, d_lse = d_out * inside[..., None, None], d_lse * inside[..., None]
    return jnp.asarray(d_out, operands.query.dtype), jnp.asarray(d_lse, jnp.float32)


def expected(name: str) -> dict[str, np.ndarray]:
    """The same by the reference in float64."""
    spec, operands = arguments(name)
    d_out, d_lse = (np.asarray(x, np.float64) for x in cotangents(name))
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            operands,
        )
        score_mod = CALLS[name][1].get("score_mod") if name in CALLS else None
        if score_mod is not None:
            traced, arrays = masks.trace_score(score_mod, jnp.float64)
            spec = dataclasses.replace(spec, score_mod=traced)
            wide = dataclasses.replace(wide, score_mod_arrays=arrays)

        biases, arrays = summed_arrays(spec, wide)

        def attend(*floats):
            main, rest = floats[: len(MAIN)], floats[len(MAIN) :]
            given = dataclasses.replace(wide, **dict(zip(MAIN, main, strict=True)))
            if biases:
                given = dataclasses.replace(given, bias=rest[0])
            if arrays:
                given = dataclasses.replace(given, score_mod_arrays=rest[len(biases) :])
            found = reference.attention(spec, given)
            return found.out, found.lse

        floats = [*(getattr(wide, n) for n in MAIN), *biases, *arrays]
        if directions(name) == ("fwd",):
            out, lse = jax.jit(attend)(*floats)
            return {"O": np.asarray(out), "LSE": np.asarray(lse)}
        (out, lse), pull = jax.vjp(jax.jit(attend), *floats)
        alive = ~jnp.isinf(lse)
        gradients = pull((jnp.where(alive[..., None], d_out, 0), jnp.where(alive, d_lse, 0)))
        names = ("O", "LSE", *gradients_of(name))
        found = dict(zip(names, (out, lse, *gradients), strict=True))
        return {n: np.asarray(x) for n, x in found.items()}


def in_simulation(key: KernelKey, inputs: list, outputs: list) -> list:
    return simulate(
        kernel_of(key), *map(np.asarray, inputs), outputs=outputs + scratch(key, inputs)
    )


def on_gpu(key: KernelKey, inputs: list, outputs: list) -> list:
    kernel = store.get(key)
    register_call_target()
    types = [jax.ShapeDtypeStruct(*o) for o in outputs + scratch(key, inputs)]
    call = jax.ffi.ffi_call(CALL_TARGET, types)
    arrays = jax.device_put(inputs, jax.local_devices(backend="cuda")[0])
    found = jax.jit(lambda *x: call(*x, module=kernel.object, key=kernel.digest))(*arrays)
    return [np.asarray(x) for x in found[: len(outputs)]]


def scratch(key: KernelKey, inputs: list) -> list:
    operands = Operands(*inputs[:3])
    if key.page_size is not None:
        table = next(x for x in inputs[3:] if x.ndim == 2 and x.dtype == jnp.int32)
        operands = dataclasses.replace(operands, page_table=table)
    return [(s, np.dtype(n)) for s, n in registry.scratch_shapes(key, operands)]


def record(name: str, arch: str, *, gpu: bool) -> dict:
    """What is written of a call: samples of each result, and where simulated, what to expect."""
    with jax.default_device("cpu"):
        found = results(name, on_gpu if gpu else in_simulation, arch)
        entry: dict[str, dict] = {n: {"samples": encoded(x)} for n, x in found.items()}
        for n, wanted in {} if gpu else expected(name).items():
            entry[n] |= {"expected": encoded(wanted), "error": error(found[n], wanted)}
    return {"features": features(name, arch), "results": entry}


def compile_ahead(kernels: list[tuple[str, Direction, str]]) -> None:
    """Compiles kernels by processes that leave the GPU alone; the store hands them to this one."""
    with (
        mock.patch.dict(os.environ, JAX_PLATFORMS="cpu"),
        ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool,
    ):
        problems = pool.map(problem_of, kernels)
        # Threads, which do not patch side by side, find these.
        for kernel in kernels:
            key_of(*kernel)
        for kernel, problem in zip(kernels, problems, strict=True):
            if problem:  # It comes again in the call that needs the kernel.
                print(*kernel, problem, flush=True)


def problem_of(kernel: tuple[str, Direction, str]) -> str | None:
    """What keeps a kernel from being compiled; functions are no message between processes."""
    try:
        store.get(key_of(*kernel))
    except Exception:
        return traceback.format_exc()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="sm_100a", choices=registry.ARCHITECTURES["fwd"])
    parser.add_argument("--gpu", action="store_true", help="run on the GPU that is there")
    parser.add_argument(
        "--calls", default="", help="only calls in whose name this pattern is found"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that simulate")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path)
    what.add_argument("--table", action="store_true", help="write docs/agreement.md")
    given = parser.parse_args()
    if given.table:
        write_page()
        return
    names = [n for n in (*CALLS, *PAGES) if re.search(given.calls, n)]
    device = jax.local_devices(backend="cuda")[0].device_kind if given.gpu else "simulator"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    made = {"jax": jax.__version__, "date": now, "commit": commit()}
    kept = json.loads(given.out.read_text()) if given.out.exists() else {}
    same = (kept.get("arch"), kept.get("device")) == (given.arch, device)
    calls = kept["calls"] if same else {}
    written: dict = {"arch": given.arch, "device": device, **made, "calls": calls}
    if given.gpu:
        compile_ahead([(n, d, given.arch) for n in names for d in directions(n)])
    failed = []
    # Beside a GPU what is prepared on the CPU takes longest.
    with (
        ThreadPoolExecutor(8)
        if given.gpu
        else ProcessPoolExecutor(given.workers, get_context("spawn"))
    ) as pool:
        runs = {n: pool.submit(record, n, given.arch, gpu=given.gpu) for n in names}
        for name, run in runs.items():
            try:
                calls[name] = run.result() | {"commit": made["commit"]}
            except Exception:
                failed.append(name)
                traceback.print_exc()
                continue
            given.out.write_text(json.dumps(written, indent=1) + "\n")
            entries = calls[name]["results"].items()
            errors = {n: f"{e['error']:.1e}" for n, e in entries if "error" in e}
            print(name, errors or "written", flush=True)
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
