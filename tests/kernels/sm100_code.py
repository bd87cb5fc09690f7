"""What ptxas makes of every Blackwell configuration: registers, memory, what is spilled and where.

    python -m tests.kernels.sm100_code --workers 8 --out FILE   # 80 minutes of a core
    python -m tests.kernels.sm100_code --table   # writes docs/blackwell_code.md of what is recorded

What ``FILE`` holds already is not made again.
"""

import argparse
import dataclasses
import json
import math
import re
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import sass_model
from jax_flashcute.ffi import fixed_point
from jax_flashcute.ffi.call import other_inputs
from jax_flashcute.ffi.compile import ArrayType, compile_kernel
from jax_flashcute.ffi.resources import ResourceReport, report
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.config.memory import SMEM_BYTES
from jax_flashcute.kernels.config.pages import SMALLEST_BOX
from jax_flashcute.kernels.config.sm100 import BwdConfigSm100, FwdConfigSm100
from jax_flashcute.kernels.elements import measures, summed_arrays
from jax_flashcute.kernels.key import KernelKey
from jax_flashcute.kernels.launchers import has_fixed_sums
from jax_flashcute.spec import AttentionSpec, Operands
from tests.cases import Case
from tests.conftest import commit
from tests.simulator.simulation import record_launches
from tests.simulator.test_block_lists import random_lists
from tests.simulator.test_forward_elements import operands_of
from tests.simulator.test_forward_features import FIRST_KEYS
from tests.simulator.test_forward_segments import call_of
from tests.user_functions import MASKS, SCORES

REPOSITORY = Path(__file__).resolve().parents[2]
RECORD = REPOSITORY / "benchmarks" / "results" / "simulator" / "code.json"
PAGE = REPOSITORY / "docs" / "blackwell_code.md"
ARCHITECTURES = ("sm_100a", "sm_103a")
NUM_SMS = 148
CLASSES = ((64, 64), (128, 128), (192, 128), (256, 256))
OTHER_HEAD_DIMS = (
    *((8, 8), (72, 40), (96, 96), (64, 128), (160, 160), (192, 192), (136, 256), (64, 256)),
    *((256, 8), (256, 128)),
)
DENSE = {
    "full": {},
    "causal": {"causal": True},
    "everything": {"causal": True, "offset": True, "lengths": True, "group": 7},
    "window": {"window": (300, 20), "offset": True, "lengths": True},
}
ELEMENTS = {
    "functions": (("documents", "gated"), {"group": 2}),
    "relative bias": (("documents", "relative_bias"), {"group": 2, "causal": True}),
    "temperature": ((None, "query_temperature"), {"group": 2, "causal": True}),
    "alibi": ((None, "alibi"), {"group": 2, "causal": True}),
    "soft cap": ((None, None), {"soft_cap": 2.0}),
    "mask": ((None, None), {"mask": "bnts"}),
    "bias, mask, soft cap, sinks": (
        (None, None),
        {"soft_cap": 2.0, "bias": "bnts", "mask": "bnts", "sinks": True, "causal": True},
    ),
}
IN_FIXED_POINT = "relative bias", "temperature"
"""Of them those whose gradients are tried in fixed point: bounded, and measured by a first run."""
LENGTHS = (1, 300, 300)
IN_ARRAYS = {
    "segments": {"segment_ids": np.arange(300)[None] // 70, "is_causal": True},
    "lists": {"block_mask": random_lists(LENGTHS, 1, 1, tile=(256, 256))},
    "union": {"mask_mod": FIRST_KEYS, "q_offset": 5},
    "bits": {"packed_mask": np.zeros((1, 1, 300, 10), np.uint32)},
}


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A kernel.

    Attributes:
      direction: fwd or bwd.
      head_dims: of query and key, of value.
      feature: of ``DENSE``, "decode", ``ELEMENTS``, ``IN_ARRAYS`` or pages; dense ones with
        ", float16" or ", deterministic" behind, those of ``IN_FIXED_POINT`` with the latter.
      arch: of ``ARCHITECTURES``.
    """

    direction: str
    head_dims: tuple[int, int]
    feature: str
    arch: str

    def __str__(self) -> str:
        dims = "/".join(map(str, self.head_dims))
        return f"{self.direction} {dims} {self.arch} {self.feature}"

    def call(self) -> tuple[AttentionSpec, Operands]:
        return call(self.feature, *self.head_dims)

    def key(self) -> KernelKey:
        spec, operands = self.call()
        assert not registry.reasons_against(spec, operands, self.direction, self.arch), self
        sms = NUM_SMS if self.direction == "fwd" else 0
        return registry.kernel_key(spec, operands, self.direction, self.arch, sms)


def call(feature: str, head_dim: int, head_dim_v: int) -> tuple[AttentionSpec, Operands]:
    """A call that gets the kernel."""
    dims = {"head_dim": head_dim, "head_dim_v": head_dim_v}
    if feature in IN_ARRAYS:
        return call_of(LENGTHS, **dims, **IN_ARRAYS[feature])
    plain = feature.removesuffix(", deterministic")
    if plain in ELEMENTS:
        (mask, score), more = ELEMENTS[plain]
        case = Case(2, 300, 300, 1, **{"group": 1} | dims | more)
        functions = (t[f](case) if f else None for t, f in ((MASKS, mask), (SCORES, score)))
        spec, operands = operands_of(case, "bfloat16", *functions)
        return dataclasses.replace(spec, deterministic=plain != feature), operands
    if feature.startswith("pages"):
        _, size, _, rows = feature.split()
        return paged(int(size), 2048 if rows == "many" else 1, **dims)
    name, *more = feature.split(", ")
    return dense(
        **{"group": 1} | dims | DENSE["causal" if name == "decode" else name],
        rows=1 if name == "decode" else 3000,
        deterministic="deterministic" in more,
        dtype=jnp.float16 if "float16" in more else jnp.bfloat16,
    )


def dense(
    *, head_dim, head_dim_v, group, rows, deterministic, dtype, causal=False, window=None,
    offset=False, lengths=False,
) -> tuple[AttentionSpec, Operands]:  # fmt: skip
    def array(length: int, heads: int, width: int):
        return jax.ShapeDtypeStruct((2, length, heads, width), dtype)

    integers = jax.ShapeDtypeStruct((2,), jnp.int32)
    operands = Operands(
        query=array(rows, 2 * group, head_dim),
        key=array(3000, 2, head_dim),
        value=array(3000, 2, head_dim_v),
        q_offset=integers if offset else None,
        query_seq_lengths=integers if lengths else None,
        key_value_seq_lengths=integers if lengths else None,
    )
    return AttentionSpec(0.125, causal, window, deterministic=deterministic), operands


def paged(size: int, rows: int, *, head_dim, head_dim_v) -> tuple[AttentionSpec, Operands]:
    integers = jax.ShapeDtypeStruct((8,), jnp.int32)
    pages = (8 * 8192 // size, size, 2)
    operands = Operands(
        query=jax.ShapeDtypeStruct((8, rows, 14, head_dim), jnp.bfloat16),
        key=jax.ShapeDtypeStruct((*pages, head_dim), jnp.bfloat16),
        value=jax.ShapeDtypeStruct((*pages, head_dim_v), jnp.bfloat16),
        q_offset=integers,
        query_seq_lengths=integers,
        key_value_seq_lengths=integers,
        page_table=jax.ShapeDtypeStruct((8, 8192 // size), jnp.int32),
    )
    return AttentionSpec(0.125, is_causal=True), operands


def configurations() -> Iterator[Configuration]:
    """Every class of head_dims with every feature, in either direction, for either Blackwell."""
    half = ("full, float16", "causal, float16")
    in_turn = tuple(f"{name}, deterministic" for name in (*DENSE, *IN_FIXED_POINT))
    pages = tuple(f"pages {size} rows {rows}" for size in (1, 4, 16) for rows in ("many", "one"))
    of_both = (*DENSE, *half, *ELEMENTS, *IN_ARRAYS)
    by_direction = {
        "fwd": (*of_both, "decode", *pages),
        "bwd": (*of_both, *in_turn),
    }
    of_others = {
        "fwd": ("full", "window", "everything", "decode"),
        "bwd": ("full", "window", "everything", "everything, deterministic"),
    }
    for head_dims, features in ((CLASSES, by_direction), (OTHER_HEAD_DIMS, of_others)):
        for arch in ARCHITECTURES:
            for dims in head_dims:
                for direction, names in features.items():
                    for feature in names:
                        yield Configuration(direction, dims, feature, arch)


def measured(configuration: Configuration) -> dict[str, int]:
    """What the kernels of a launcher take at most.

    ``registers`` a thread at launch; bytes a thread ``spilled``, and of these the ones that
    ``spilled_in_loops`` over tiles; bytes of shared memory a block.

    Raises:
      AssertionError: an instruction that is meant is not there, or a limit is passed.
    """
    spec, operands = configuration.call()
    key = configuration.key()
    arrays = [None if a is None else ArrayType(*a) for a in registry.arrays_of(key)]
    kernel = compile_kernel(registry.builder(key), arrays, key.arch, keep_intermediates=True)
    assert kernel.cubin is not None
    assert kernel.ptx is not None
    reports = report(kernel.cubin)
    found = [r for r in reports if r.count("UTCHMMA")]
    assert sum(r.count("UTCHMMA") for r in found) == kernel.ptx.count("tcgen05.mma.")
    for each in found:
        check_instructions(key, each)
    # Blocks of the forward take several tiles of work; those of the backward one.
    depth = 2 if key.direction == "fwd" else 1
    codes = sass_model.kernels_of(kernel.cubin)
    launches = record_launches(kernel, buffers(key, spec, operands), num_sms=NUM_SMS)
    registers = {r.kernel: r.registers for r in reports}
    for launch in launches:
        assert launch.shared_bytes <= SMEM_BYTES
        assert math.prod(launch.block) * registers[launch.kernel] <= 65536
    return {
        "registers": max(r.registers for r in reports),
        "spilled": max(r.stack_bytes + r.local_bytes for r in reports),
        "spilled_in_loops": max(len(spilled_in_loops(code, depth)) for code in codes),
        "shared": max(launch.shared_bytes for launch in launches),
    }


def check_instructions(key: KernelKey, found: ResourceReport) -> None:
    """Tensor memory, TMA, mask bits eight at once, arithmetic in pairs; registers moved."""
    config = key.config
    if isinstance(config, FwdConfigSm100):
        registers = {
            *(config.softmax_registers, config.correction_registers, config.other_registers)
        }
        # Q by TMA; K and V too, but from small pages.
        copied = key.page_size is not None and key.page_size < SMALLEST_BOX
        least = {"LDTM": 3, "STTM": 2, "UTMALDG": 1 if copied else 3, "STG.E.128": 1}
        least |= {"LDGSTS": 1 if copied else 0}
        least |= {"R2P": config.tile_n // 8, "FFMA2": config.tile_n // 2}
    else:
        assert isinstance(config, BwdConfigSm100)
        parts = config.passes or (config,)
        registers = {p.gradient_registers for p in parts} | {p.other_registers for p in parts}
        registers |= set() if config.passes else {config.reduce_registers}
        # dK and dV by TMA; dQ by bulk reductions where it does not have a kernel of its own.
        if not found.count("UTMASTG"):
            # A first run of the kernel stores nothing.
            assert measures(key.elements, config.deterministic)
            assert not found.count("UBLKRED") + found.count("STTM") + found.count("STG")
            return
        least = {"LDTM": 3, "STTM": 1, "UTMALDG": 3, "UTMASTG": 2, "R2P": 8, "FFMA2": 32}
        least |= {} if config.passes else {"LDTM": 6, "STTM": 3, "UTMALDG": 4, "UBLKRED": 1}
        added = found.count("RED") + found.count("REDG") + found.count("ATOMG")
        if not (key.elements is not None and key.elements.summed_ranks):
            assert added == (1 if config.deterministic else 0)
        assert not (config.passes and found.count("UBLKRED"))
    assert set(found.reallocated_registers) == registers
    assert found.highest_register < max(registers)
    for name, count in least.items():
        assert found.count(name) >= count, (name, found.count(name))


def buffers(key: KernelKey, spec: AttentionSpec, operands: Operands) -> list:
    """Addresses and shapes of what a launcher takes."""
    query, main = operands.query, [operands.query, operands.key, operands.value]
    rows, out = query.shape[:3], (*query.shape[:3], operands.value.shape[3])
    others = jax.eval_shape(lambda given: other_inputs(key, spec, given), operands)
    shapes = [x.shape for x in main]
    if key.direction == "fwd":
        shapes += [*(x.shape for x in others), out, rows]
    else:
        biases, arrays = summed_arrays(spec, operands)
        sums = [*biases, *arrays]
        exponents = []
        if has_fixed_sums(key):
            exponents = [(len(sums),)]
            sums = fixed_point.raw(key.elements, sums)
        results = (*main, *sums)
        shapes += [out, rows, out, rows, *(x.shape for x in others), *exponents]
        shapes += [x.shape for x in results]
    shapes += [shape for shape, _ in registry.scratch_shapes(key, operands)]
    return [(256 * (i + 1) << 32, tuple(shape)) for i, shape in enumerate(shapes)]


def spilled_in_loops(code: list[sass_model.Instruction], depth: int) -> set[int]:
    """The bytes of a thread's stack that loops touch which lie within ``depth - 1`` others."""
    bodies = {body[0].address: body for body in sass_model.loops(code)}  # the longest from each
    inside = sass_model.Counter(i.address for body in bodies.values() for i in body)
    found: set[int] = set()
    for i in code:
        if i.name in ("LDL", "STL") and inside[i.address] >= depth:
            place = re.search(r"\[R1(?:\+0x([0-9a-f]+))?\]", i.operands)
            assert place, f"{i.opcode} {i.operands}"
            width = re.search(r"\.(64|128)", i.opcode)
            first = int(place[1] or "0", 16)
            found |= set(range(first, first + (int(width[1]) // 8 if width else 4)))
    return found


def judged(configuration: Configuration) -> tuple[str, dict]:
    try:
        return str(configuration), measured(configuration)
    except Exception:  # the others go on
        return str(configuration), {"error": traceback.format_exc()[-2000:]}


def compiler() -> str:
    return f"CuTe DSL {metadata.version('nvidia-cutlass-dsl')}"


def write_record(path: Path, workers: int, only: str) -> None:
    """Adds to ``path`` what it lacks of the configurations in whose name ``only`` is found."""
    kept = json.loads(path.read_text())["configurations"] if path.exists() else {}
    found = {name: row for name, row in kept.items() if "error" not in row}
    wanted = [c for c in configurations() if str(c) not in found and re.search(only, str(c))]
    order = [str(c) for c in configurations()]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for future in as_completed(pool.submit(judged, c) for c in wanted):
            name, row = future.result()
            print(name, row, flush=True)
            found[name] = row
            record = {
                "commit": commit(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "compiler": compiler(),
                "configurations": {n: found[n] for n in order if n in found},
            }
            path.write_text(json.dumps(record, indent=1) + "\n")


TEXT = """\
# The machine code of the Blackwell kernels

Written by `python -m tests.kernels.sm100_code --table` of what

```sh
python -m tests.kernels.sm100_code --workers 8 --out benchmarks/results/simulator/code.json
```

has found (80 minutes of a core, no GPU). **No Blackwell GPU has run these kernels.** Each is
compiled as a call gets it; products on tensor cores, tensor memory, TMA, mask bits eight at once
(R2P) and arithmetic in pairs are looked for in its code, and its registers and shared memory held
against what a block may have.

"""


def page(record: dict) -> str:
    """The documentation's page: how many configurations, and every one that spills."""
    rows = record["configurations"]
    failed = [name for name, row in rows.items() if "error" in row]
    assert not failed, failed
    spilling = {name: row for name, row in rows.items() if row["spilled"]}
    in_loops = sum(bool(row["spilled_in_loops"]) for row in rows.values())
    of = f"{len(rows)} of {sum(1 for _ in configurations())}"
    shared = max(row["shared"] for row in rows.values())
    text = f"""{TEXT}{of} configurations, {record["compiler"]}, {record["commit"]}:
{len(rows) - len(spilling)} spill nothing, {len(spilling)} some registers, {in_loops} of these in
loops over tiles. A block takes at most {shared:,} bytes of shared memory, of {SMEM_BYTES:,}.

Bytes a thread that are spilled, all and those that a loop over tiles reads or writes:

| | head_dims | | | spilled | in loops |
|---|---|---|---|---:|---:|
"""
    for name, row in spilling.items():
        direction, dims, arch, feature = name.split(" ", 3)
        words = {"fwd": "forward", "bwd": "backward"}[direction]
        cells = (words, dims, feature, arch, row["spilled"], row["spilled_in_loops"])
        text += f"| {' | '.join(map(str, cells))} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", default="", help="configurations in whose name this is found")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path)
    what.add_argument("--table", action="store_true", help=f"write {PAGE.name}")
    arguments = parser.parse_args()
    if arguments.table:
        PAGE.write_text(page(json.loads(RECORD.read_text())))
    else:
        write_record(arguments.out, arguments.workers, arguments.only)


if __name__ == "__main__":
    main()
