"""The implementations that can be measured, one module each.

A peer is a module of this package with two functions:

    available() -> str | None           why it cannot run here, or None
    build(case, pass_) -> Step          a call on random normal inputs

Its module's name is its name on the command line and in the results.  ``build`` raises where the
peer cannot run a case; the harness reports that and goes on.
"""

import importlib
from types import ModuleType

NAMES = (
    "jax_flashcute",
    "jax_flashcute_dense",
    "jax_nn_cudnn",
    "jax_nn_xla",
    "copy",
    "fla_nsa",
    "flash_attention_3_jax",
    "flash_attention_4",
    "flash_attention_4_elements",
    "flashinfer",
    "pallas_mgpu",
    "tokamax_mosaic",
    "torch_flex",
    "torch_sdpa_cudnn",
)

NSA = ("jax_flashcute", "copy", "fla_nsa")
"""Those that measure native sparse attention and its stages; the others are dense attention."""


def load(name: str) -> ModuleType:
    """The module of a peer."""
    return importlib.import_module(f"benchmarks.peers.{name}")


def cannot_import(module: str) -> str | None:
    """Why a module cannot be imported, or None."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation raises anything
        return f"{module} cannot be imported: {type(error).__name__}: {error}"
    return None
