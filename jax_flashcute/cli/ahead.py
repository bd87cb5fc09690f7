"""``jax-flashcute compile``: kernels for the plans of TOML files, in parallel."""

import argparse
import contextlib
import functools
import importlib
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_flashcute import api, plan
from jax_flashcute.ffi import bundle, kernel_file, store
from jax_flashcute.ffi.toolchain import INSTALL_COMPILER, toolchain
from jax_flashcute.kernels.key import AnyKey, Direction
from jax_flashcute.recording import plans
from jax_flashcute.recording.programs import parse_array

FUNCTIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (api.flash_attention, api.dot_product_attention, api.paged_attention)
}
"""What a ``[[call]]`` may call by name alone."""


@dataclass(frozen=True)
class Job:
    """One kernel to compile: its plan as a table, so that another process can read it."""

    target: str
    table: Mapping[str, Any]
    machine: str
    out: Path | None


def run(options: argparse.Namespace) -> int:
    """Compiles; returns 1 where a call or a plan is served by no kernel."""
    if options.wheel and not options.out:
        raise ValueError("--wheel needs --out, the directory to write it into")
    if options.wheel:
        bundle.wheel_package(options.wheel, options.wheel_version)
    if options.host and not options.out:
        raise ValueError("--host needs --out: the store is this machine's")
    if options.jobs < 1:
        raise ValueError(f"--jobs must be positive, got {options.jobs}")
    wanted, problems = _wanted(options.files, options.arch)
    made_by = replace(toolchain(), machine=options.host or toolchain().machine)
    if made_by.dsl is None:
        raise ImportError(f"the compiler is absent; install it with: {INSTALL_COMPILER}")
    jobs = []
    for key, (target, found) in wanted.items():
        try:
            jobs.append(Job(target, found.to_toml(key), made_by.machine, options.out))
        except NotImplementedError as error:
            problems.append(f"a plan for {target}: {error}")
    with contextlib.ExitStack() as stack:
        folder: Path | None = options.out
        if options.wheel:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            bundle.write_manifest(folder, made_by, sorted({job.target for job in jobs}))
        problems += _compile_all([replace(job, out=folder) for job in jobs], options.jobs)
        where = folder or store.directory()
        if options.wheel:
            where = bundle.write_wheel(
                bundle.Bundle.open(where), options.out, options.wheel, options.wheel_version
            )
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(wanted)} kernels wanted, {len(problems)} problems; {where}")
    return 1 if problems else 0


def _wanted(
    files: Iterable[Path], targets: list[str] | None
) -> tuple[dict[AnyKey, tuple[str, plans.RecordedPlan]], list[str]]:
    """The kernels that files ask for and the targets they are for; and what no kernel serves."""
    found: dict[AnyKey, tuple[str, plans.RecordedPlan]] = {}
    problems: list[str] = []
    for file in files:
        recorded, calls = plans.read_plans(file)
        for one in recorded:
            for target in targets or [one.target]:
                with _target(target):
                    try:
                        found[one.key()] = (target, one)
                    except NotImplementedError as error:
                        problems.append(f"{file}: a plan for {target}: {error}")
        for i, table in enumerate(calls, 1):
            for target in targets or [_own_target()]:
                with _target(target):
                    collected, refused = _plans_or_reasons(table, f"{file}: call {i}")
                    problems += [f"{file}: call {i} for {target}: {why}" for why in refused]
                    found |= {key: (target, one) for key, one in collected.items()}
    return found, problems


def _plans_or_reasons(
    table: Mapping[str, Any], where: str
) -> tuple[dict[AnyKey, plans.RecordedPlan], list[str]]:
    """The plans of a ``[[call]]``, and why there are none for some of its passes."""
    found: dict[AnyKey, plans.RecordedPlan] = {}
    refused = []
    arguments = dict(table)
    passes = arguments.pop("passes", ["fwd"])
    is_known = isinstance(passes, list) and all(x in ("fwd", "bwd") for x in passes)
    if not passes or not is_known:
        raise ValueError(f'{where}: passes must be ["fwd"] or ["fwd", "bwd"], got {passes!r}')
    for direction in passes:
        try:
            found |= plans_of_call(arguments, direction)
        except NotImplementedError as error:
            refused.append(str(error))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
    return found, refused


def plans_of_call(
    table: Mapping[str, Any], direction: Direction
) -> dict[AnyKey, plans.RecordedPlan]:
    """The plans of a ``[[call]]`` on the target that ``JAX_FLASHCUTE_ARCH`` names.

    Args:
      table: arguments by name: arrays as ``"bfloat16[2,300,4,64]"``, functions as
        ``"module:name"``, everything else as it is, infinity for None.  ``function`` is what is
        called.
      direction: the forward pass alone, or the backward pass and the forward pass it needs.

    Raises:
      NotImplementedError: no kernel serves it, with every reason; or its backward pass.
      ValueError: an argument does not fit.
    """
    arguments = dict(table)
    name = arguments.pop("function", "flash_attention")
    if isinstance(name, str) and name in FUNCTIONS:
        function = FUNCTIONS[name]
        if name != "dot_product_attention":
            arguments.setdefault("implementation", "cute")
    else:
        function = _imported(name)
    scope = jax.export.SymbolicScope()
    arrays = {k: parse_array(v, scope) for k, v in arguments.items() if _is_array(v)}
    static = {k: _argument(v) for k, v in arguments.items() if not _is_array(v)}

    def forward(arrays):
        return function(**arrays, **static)

    def backward(floating, others):
        results = jax.tree.leaves(forward({**floating, **others}))
        return sum(jnp.sum(x.astype(jnp.float32)) for x in results)

    with plans.collecting() as collected:
        if direction == "bwd":
            floating = {k: v for k, v in arrays.items() if jnp.issubdtype(v.dtype, jnp.floating)}
            others = {k: v for k, v in arrays.items() if k not in floating}
            traced = jax.jit(jax.grad(backward)).trace(floating, others)
        else:
            traced = jax.jit(forward).trace(arrays)
        traced.lower(lowering_platforms=("cuda",))
    if not collected:
        raise NotImplementedError("it calls no kernel; jax_flashcute.explain says why")
    if direction == "bwd" and not any("backward" in key.kernel for key in collected):
        raise NotImplementedError(
            "its backward pass calls no kernel; jax_flashcute.explain says why"
        )
    return collected


def _is_array(value: Any) -> bool:
    return isinstance(value, str) and value.endswith("]")


def _argument(value: Any) -> Any:
    match value:
        case str() if ":" in value:
            return _imported(value)
        case float() if math.isinf(value):
            return None
        case list():
            return tuple(map(_argument, value))
    return value


def _imported(name: Any) -> Any:
    """What ``module:name`` stands for, of a module that can be imported here."""
    module, _, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not attribute:
        raise ValueError(
            f'function must be one of {", ".join(FUNCTIONS)} or "module:name", got {name!r}'
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from error


def _own_target() -> str:
    known = plan.target()
    if known is None:
        raise ValueError("there is no CUDA device here: name an architecture with --arch")
    return str(known)


@contextlib.contextmanager
def _target(target: str) -> Iterator[None]:
    """Plans are made for a target inside."""
    before = os.environ.get(plan.ARCH_VARIABLE)
    os.environ[plan.ARCH_VARIABLE] = target
    try:
        yield
    finally:
        if before is None:
            del os.environ[plan.ARCH_VARIABLE]
        else:
            os.environ[plan.ARCH_VARIABLE] = before


def _compile_all(jobs: list[Job], processes: int) -> list[str]:
    """Compiles all; returns what went wrong."""
    problems = []
    # Fresh processes: a fork of one in which XLA has threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(processes, len(jobs))), mp_context=context) as pool:
        pending = {pool.submit(compile_job, job): job for job in jobs}
        for done in _with_progress(as_completed(pending), len(jobs)):
            error = done.exception()
            if error is not None:
                job = pending[done]
                problems.append(f"plan {job.table['id']} for {job.target}: {error}")
    return problems


def _with_progress(done: Iterable, total: int) -> Iterable:
    try:
        from tqdm import tqdm
    except ImportError:
        return _with_lines(done, total)
    return tqdm(done, total=total, unit="kernel", desc="compiling")


def _with_lines(done: Iterable, total: int) -> Iterator:
    for i, one in enumerate(done, 1):
        print(f"compiled {i} of {total}", flush=True)
        yield one


def compile_job(job: Job) -> None:
    """Compiles one kernel into the store and, where one is named, a bundle.

    Raises:
      ValueError: the plan that was read is not the plan that was written.
      OSError: the bundle cannot be written.
    """
    os.environ[plan.ARCH_VARIABLE] = job.target
    os.environ[store.COMPILE_VARIABLE] = "jit"
    os.environ["JAX_PLATFORMS"] = "cpu"
    key = plans.RecordedPlan.from_toml(dict(job.table)).key()
    if plans.plan_id(key) != job.table["id"]:
        raise ValueError(f"it was read back as plan {plans.plan_id(key)}")
    here = toolchain()
    if job.machine == here.machine:
        kernel = store.get(key)
    else:
        kernel = store.compile_key(key, job.machine)
    if job.out is not None:
        made_by = replace(here, machine=job.machine)
        path = job.out / (kernel_file.entry_name(key, made_by) + kernel_file.SUFFIX)
        kernel_file.write(path, kernel_file.pack(key, kernel, made_by))
