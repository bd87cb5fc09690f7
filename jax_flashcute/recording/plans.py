"""Plans in a TOML file: what a run's calls were, so that their kernels can be compiled for others.

    [[plan]]
    id = "0f3b5cf2a5d8e0c1"          # of the kernel, on the target below
    target = "sm_90a:132"
    direction = "fwd"
    spec = {scale = 0.125, is_causal = true}
    operands = {query = "bfloat16[2,300,4,64]", key = "bfloat16[2,300,2,64]", ...}

A plan holds the call and not the kernel's tiles, so it can be compiled for another architecture.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_flashcute import plan
from jax_flashcute.block_mask import BlockMask
from jax_flashcute.kernels.key import AnyKey, Direction
from jax_flashcute.kernels.nsa import NSAKernelKey
from jax_flashcute.masks import TracedFunction
from jax_flashcute.recording.programs import (
    array_text,
    decode_program,
    encode_program,
    parse_array,
)
from jax_flashcute.segments import Segments
from jax_flashcute.spec import AttentionSpec, Operands

RECORD_VARIABLE = "JAX_FLASHCUTE_RECORD"
"""Environment variable that names a file; each plan that a process uses is appended to it."""

_NESTED = {x.__name__: x for x in (BlockMask, Segments)}


@dataclass(frozen=True)
class Call:
    """One pass of a call of ``flash_attention``.

    Attributes:
      spec: its static part.
      operands: its arrays, or ``jax.ShapeDtypeStruct`` in their places.
      direction: the forward or the backward pass.
    """

    spec: AttentionSpec
    operands: Operands
    direction: Direction


Wanted = Call | NSAKernelKey
"""What a plan is made of: a call, or the kernel of a piece of native sparse attention."""


@dataclass(frozen=True)
class RecordedPlan:
    """A call for which a kernel is wanted.

    Attributes:
      target: the architecture and multiprocessors of the machine that made it, ``sm_90a:132``.
      wanted: the call; a kernel for native sparse attention is named itself.
    """

    target: str
    wanted: Wanted

    def key(self) -> AnyKey:
        """The compile key for the target that ``JAX_FLASHCUTE_ARCH`` names."""
        if isinstance(self.wanted, Call):
            return plan.make_plan(self.wanted.spec, self.wanted.operands, self.wanted.direction)
        return plan.make_nsa_plan(self.wanted)

    def to_toml(self, key: AnyKey) -> dict[str, Any]:
        """A table of a plan file.

        Raises:
          NotImplementedError: a mask or a score cannot be written.
        """
        table: dict[str, Any] = {"id": plan_id(key), "target": self.target}
        if isinstance(self.wanted, NSAKernelKey):
            return {**table, "nsa": dataclasses.asdict(self.wanted)}
        return {
            **table,
            "direction": self.wanted.direction,
            "spec": _encode_fields(self.wanted.spec),
            "operands": _encode_fields(self.wanted.operands),
        }

    @staticmethod
    def from_toml(table: dict[str, Any]) -> "RecordedPlan":
        """The plan of a table.

        Raises:
          ValueError: it does not fit this version of the package.
        """
        try:
            if "nsa" in table:
                return RecordedPlan(table["target"], NSAKernelKey(**table["nsa"]))
            spec = _decode_fields(AttentionSpec, table["spec"])
            operands = _decode_fields(Operands, table["operands"])
            return RecordedPlan(table["target"], Call(spec, operands, table["direction"]))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"plan {table.get('id', '')}: does not fit this version ({error!r})"
            ) from error


def plan_id(key: AnyKey) -> str:
    """A short name of a kernel, whatever the toolchain."""
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


_sinks: list[dict[AnyKey, RecordedPlan]] = []
_recorded: set[tuple[str, AnyKey]] = set()


@contextlib.contextmanager
def collecting() -> Iterator[dict[AnyKey, RecordedPlan]]:
    """Collects the plans of all calls that are lowered inside; nothing is compiled."""
    found: dict[AnyKey, RecordedPlan] = {}
    _sinks.append(found)
    try:
        yield found
    finally:
        _sinks.remove(found)


def note(key: AnyKey, wanted: Wanted) -> bool:
    """Takes note of a plan that is about to be used; returns whether it is only collected."""
    path = os.environ.get(RECORD_VARIABLE)
    if _sinks or path:
        found = RecordedPlan(str(plan.target()), wanted)
        for sink in _sinks:
            sink[key] = found
        if path and not _sinks and (path, key) not in _recorded:
            _recorded.add((path, key))
            _append(Path(path), found, key)
    return bool(_sinks)


def _append(path: Path, found: RecordedPlan, key: AnyKey) -> None:
    """Appends a plan, unless its kernel is in the file already; several processes may do so."""
    try:
        text = "\n[[plan]]\n" + "".join(
            f"{name} = {_toml(value)}\n" for name, value in found.to_toml(key).items()
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if f'id = "{plan_id(key)}"' not in file.read():
                file.write(text)
    except (OSError, NotImplementedError) as error:
        warnings.warn(f"jax_flashcute: a plan was not recorded in {path}: {error}", stacklevel=2)


def read_plans(path: Path) -> tuple[list[RecordedPlan], list[dict[str, Any]]]:
    """The plans of a file, and its ``[[call]]`` tables as they are.

    Raises:
      ValueError: the file is no TOML, or holds something else.
      OSError: it cannot be read.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    unknown = content.keys() - {"plan", "call"}
    if unknown:
        raise ValueError(
            f"{path}: expected [[plan]] and [[call]] tables, got {', '.join(sorted(unknown))}"
        )
    tables = {name: content.get(name, []) for name in ("plan", "call")}
    for name, found in tables.items():
        if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
            raise ValueError(f"{path}: expected [[{name}]] tables, got {name} = {found!r}")
    return [RecordedPlan.from_toml(t) for t in tables["plan"]], tables["call"]


def _encode_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    fields = [(f, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return {f.name: _encode(x) for f, x in fields if x is not f.default and x != ()}


def _encode(value: Any) -> Any:
    match value:
        case None:
            return {"is": "None"}
        case bool() | int() | float():
            return value
        case str():
            return {"is": "str", "value": value}
        case tuple() | list():
            return [_encode(v) for v in value]
        case TracedFunction():
            return {"is": "TracedFunction", **encode_program(value)}
        case _ if type(value).__name__ in _NESTED:
            return {"is": type(value).__name__, **_encode_fields(value)}
        case _ if hasattr(value, "shape"):
            return array_text(value)
    raise NotImplementedError(f"{type(value).__name__} cannot be written to a file")


def _decode_fields(cls: type, table: dict[str, Any]) -> Any:
    return cls(**{name: _decode(value) for name, value in table.items()})


def _decode(value: Any) -> Any:
    match value:
        case {"is": "None"}:
            return None
        case {"is": "str", "value": text}:
            return text
        case {"is": "TracedFunction", **program}:
            return decode_program(program)
        case {"is": kind, **fields}:
            return _decode_fields(_NESTED[kind], fields)
        case list():
            return tuple(map(_decode, value))
        case str():
            return parse_array(value)
    return value


def _toml(value: Any) -> str:
    """A value as TOML writes it; dictionaries become inline tables."""
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            # TOML's basic strings have JSON's escapes.
            return json.dumps(value)
        case dict():
            return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
        case _:
            return "[" + ", ".join(map(_toml, value)) + "]"
