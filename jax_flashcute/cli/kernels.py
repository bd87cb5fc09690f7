"""``jax-flashcute list``, ``inspect`` and ``clear``: the kernels of the store or of a bundle."""

import argparse
import struct
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from jax_flashcute.ffi import kernel_file, resources, store
from jax_flashcute.ffi.bundle import Bundle
from jax_flashcute.ffi.compile import CompiledKernel
from jax_flashcute.ffi.toolchain import toolchain

NAME_LENGTH = 12
"""Characters of a kernel's name that are printed; any unique beginning of it is understood."""

_ELF = b"\x7fELF"
_CUDA = 190
"""The machine of an ELF file that a GPU runs."""


def run_list(options: argparse.Namespace) -> int:
    """Prints a line for each kernel."""
    files = _files(options.bundle)
    rows = [("name", "kernel", "target", "dtype", "head_dim", "group", "keys", "does", "KiB", "")]
    for path, description, kernel in _read_all(files):
        dims = sorted({description["head_dim"], description["head_dim_v"]}, reverse=True)
        does = [*description.get("optional", ()), *description.get("elements", ())]
        does += [name for name in ("pack_gqa", "split_kv", "page_size") if description.get(name)]
        unlike = description["toolchain"] != asdict(toolchain())
        rows.append(
            (
                path.name[:NAME_LENGTH],
                description["kernel"],
                f"{description['arch']}:{description.get('num_sms') or 'any'}",
                description["dtype"],
                "/".join(map(str, dims)),
                str(description.get("group", "any")),
                description.get("interval", "-"),
                ", ".join(does) or "-",
                f"{len(kernel.object) / 1024:.0f}",
                "of another toolchain" if unlike else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows if len(rows) > 1 else []:
        print("  ".join(f"{x:{width}}" for x, width in zip(row, widths, strict=True)).rstrip())
    print(f"{len(rows) - 1} kernels in {options.bundle or store.directory()}")
    return 0


def run_inspect(options: argparse.Namespace) -> int:
    """Prints what kernels take of the GPU; returns 1 where none has a name that was given."""
    files = _files(options.bundle)
    if options.names:
        files = [f for f in files if any(f.name.startswith(name) for name in options.names)]
        if not files:
            raise ValueError(f"no kernel is named {' or '.join(options.names)}")
    for path, description, kernel in _read_all(files):
        print(f"{path.name[:NAME_LENGTH]}  {description['kernel']} for {description['arch']}")
        names = description.keys() - {"kernel", "arch", "toolchain", "smem_bytes"}
        for name in [name for name in description if name in names and description[name]]:
            print(f"  {name}: {description[name]}")
        if "smem_bytes" in description:
            print(f"  tiles in shared memory: {description['smem_bytes']} bytes")
        for report in resources.report(cubin_of(kernel)):
            _print_report(report, options.opcodes)
    return 0


def _print_report(report: resources.ResourceReport, opcodes: int) -> None:
    print(f"  {report.kernel}")
    print(f"    registers a thread: {report.registers} at launch", end="")
    if report.reallocated_registers:
        print(f", then {', '.join(map(str, report.reallocated_registers))} by warpgroup", end="")
    print(f"\n    shared memory: {report.shared_bytes} bytes static")
    spills = report.spill_loads + report.spill_stores
    print(
        f"    spills: {report.spill_loads} loads, {report.spill_stores} stores"
        if spills
        else "    spills: none"
    )
    frequent = sorted(report.opcodes.items(), key=lambda x: (-x[1], x[0]))[:opcodes]
    total = sum(report.opcodes.values())
    print(f"    instructions: {total}; {', '.join(f'{n} {name}' for name, n in frequent)}")


def run_clear(options: argparse.Namespace) -> int:
    """Removes kernels and what belongs to them from the store."""
    directory, removed, size = store.directory(), 0, 0
    here = asdict(toolchain())
    for path in _files(None):
        if options.stale:
            try:
                if kernel_file.unpack(path.read_bytes())[0]["toolchain"] == here:
                    continue
            except kernel_file.DamagedKernelError:
                pass
        removed, size = removed + 1, size + path.stat().st_size
        path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)
    if not options.stale:
        for pattern in ("*.lock", f"*{store.PART_SUFFIX}"):
            for path in directory.glob(pattern):
                path.unlink(missing_ok=True)
    print(f"{removed} kernels removed, {size / 2**20:.1f} MiB, from {directory}")
    return 0


def _files(bundle: Path | None) -> list[Path]:
    if bundle is not None:
        return Bundle.open(bundle).files()
    return sorted(store.directory().glob(f"*{kernel_file.SUFFIX}"))


def _read_all(files: list[Path]) -> Iterator[tuple[Path, dict, CompiledKernel]]:
    for path in files:
        try:
            yield path, *kernel_file.unpack(path.read_bytes())
        except kernel_file.DamagedKernelError:
            print(f"{path} is damaged", file=sys.stderr)


def cubin_of(kernel: CompiledKernel) -> bytes:
    """The GPU code in an object: an ELF file of its own among the data of the launcher.

    Raises:
      ValueError: there is none.
    """
    content, start = kernel.object, 0
    while (start := content.find(_ELF, start)) >= 0:
        machine = struct.unpack_from("<H", content, start + 18)[0]
        if machine == _CUDA:
            tables = struct.unpack_from("<QQ", content, start + 32)
            *_, p_size, p_count, s_size, s_count = struct.unpack_from("<HHHHH", content, start + 52)
            ends = zip(tables, (p_size * p_count, s_size * s_count), strict=True)
            return content[start : start + max(map(sum, ends))]
        start += len(_ELF)
    raise ValueError("the object holds no GPU code")
