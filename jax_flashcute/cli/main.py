"""The console script ``jax-flashcute``."""

import argparse
import os
import sys
from pathlib import Path

from jax_flashcute.cli import ahead, doctor, kernels
from jax_flashcute.ffi.bundle import BundleRefusedError
from jax_flashcute.ffi.compile import HOST_TARGETS


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    # Nothing here computes on a GPU; doctor asks what there is, and leaves its memory alone.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (BundleRefusedError, ImportError, OSError, ValueError) as error:
        print(f"jax-flashcute {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-flashcute", description=sys.modules[__name__].__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("compile", help="compile the plans of TOML files")
    command.set_defaults(run=ahead.run)
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="TOML files of plans")
    command.add_argument(
        "--arch",
        action="append",
        metavar="ARCH[:SMS]",
        help="architecture and number of multiprocessors, such as sm_90a:132; may be repeated; "
        "by default each plan's own, and this machine's for calls",
    )
    command.add_argument(
        "--host", choices=sorted(HOST_TARGETS), help="processor of the hosts; by default this one"
    )
    command.add_argument("--out", type=Path, help="directory of the bundle; the store if absent")
    command.add_argument("--wheel", metavar="NAME", help="write a wheel of this name into --out")
    command.add_argument("--wheel-version", default="1.0", metavar="VERSION")
    command.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")

    command = commands.add_parser("list", help="list compiled kernels")
    command.set_defaults(run=kernels.run_list)
    _add_place(command)

    command = commands.add_parser("inspect", help="registers, shared memory, spills and opcodes")
    command.set_defaults(run=kernels.run_inspect)
    command.add_argument(
        "names", nargs="*", metavar="NAME", help="as list prints them; all if none"
    )
    command.add_argument("--opcodes", type=int, default=12, help="how many of the most frequent")
    _add_place(command)

    command = commands.add_parser("doctor", help="what works on this machine, and what to install")
    command.set_defaults(run=doctor.run)

    command = commands.add_parser("clear", help="remove the kernels of the store")
    command.set_defaults(run=kernels.run_clear)
    command.add_argument(
        "--stale", action="store_true", help="only those that this installation cannot use"
    )
    return parser


def _add_place(command: argparse.ArgumentParser) -> None:
    command.add_argument("--bundle", type=Path, help="directory of a bundle; the store if absent")
