"""What starting costs: first calls of new shapes, the demo, and a server's first token, where only
a bundle and the CuTe runtime library are there, and where kernels are compiled as they are met.

    python -m benchmarks.start_up --out benchmarks/results/h200/start_up.json

A bundle is compiled first.  Processes that are to use it then see this repository, the runtime
library and no compiler, and may not compile (``JAX_FLASHCUTE_COMPILE=error``); the others start
with an empty store.  One row a measurement; all times are the host's, in seconds but for ``ms``.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.run import commit
from jax_flashcute import flash_attention
from jax_flashcute.ffi.kernel_file import SUFFIX
from jax_flashcute.ffi.runtime import find_library
from jax_flashcute.ffi.toolchain import RUNTIME

REPOSITORY = Path(__file__).resolve().parent.parent
TARGET = "sm_90a:132"

# What the parts call: the demo's batches and sample, the server's chunks and decode steps.
_DEMO = [(4, 256), (1, 256)]
_STEPS = [(1, 16), (1, 64), *((2**i, 1) for i in range(5))]
_FIRST_CALL = (2, 4096, 8, 2, 128)  # long: shorter ones have a kernel of their own

# Put in front of what is installed, where the compiler is part of that.
_NO_COMPILER = """
import sys
from importlib import metadata

class NoCompiler:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "cutlass":
            raise ModuleNotFoundError(f"{name} is absent", name=name)

sys.meta_path.insert(0, NoCompiler())
"""


def plans() -> str:
    """A TOML of every call that the parts make."""
    calls = []
    for passes, (B, T, N, K, H) in [
        (("fwd",), _FIRST_CALL),
        *((("fwd", "bwd"), (B, T, 4, 2, 32)) for B, T in _DEMO),
    ]:
        calls.append(
            f"[[call]]\npasses = {json.dumps(passes)}\nis_causal = true\n"
            f'query = "bfloat16[{B},{T},{N},{H}]"\n'
            + "".join(f'{name} = "bfloat16[{B},{T},{K},{H}]"\n' for name in ("key", "value"))
        )
    for B, T in _STEPS:
        calls.append(
            f'[[call]]\nfunction = "paged_attention"\nquery = "bfloat16[{B},{T},6,64]"\n'
            + "".join(f'{name} = "bfloat16[256,16,2,64]"\n' for name in ("k_pages", "v_pages"))
            + f'page_table = "int32[{B},24]"\n'
            + "".join(f'{name} = "int32[{B}]"\n' for name in ("kv_lengths", "q_lengths"))
        )
    return "\n".join(calls)


# ---- environments ----------------------------------------------------------------------------


def runtime_only(folder: Path) -> None:
    """Makes a folder for PYTHONPATH in which the runtime library is all there is of CuTe DSL."""
    library = find_library()
    copy = folder / "nvidia_cutlass_dsl" / "cu13" / "lib" / library.name
    copy.parent.mkdir(parents=True)
    copy.symlink_to(library)
    with contextlib.suppress(metadata.PackageNotFoundError):
        information = next(
            f.locate() for f in metadata.distribution(RUNTIME).files or () if f.name == "METADATA"
        )
        shutil.copytree(Path(information).parent, folder / Path(information).parent.name)
    (folder / "sitecustomize.py").write_text(_NO_COMPILER)


class Environments:
    """Variables of the processes that are measured; everything lies in one temporary folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bundle = folder / "bundle"
        shared = os.environ | {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PYTHONUNBUFFERED": "1",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
        for name in ("JAX_FLASHCUTE_BUNDLE", "JAX_FLASHCUTE_COMPILE"):
            shared.pop(name, None)
        runtime_only(folder / "runtime")
        self.with_bundle = shared | {
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{folder / 'runtime'}",
            "JAX_FLASHCUTE_BUNDLE": str(self.bundle),
            "JAX_FLASHCUTE_CACHE_DIR": str(folder / "nothing"),
            "JAX_FLASHCUTE_COMPILE": "error",
        }
        path = os.environ.get("PYTHONPATH")
        self.without = shared | {
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *([path] if path else [])]),
            "JAX_FLASHCUTE_CACHE_DIR": str(folder / "store"),
        }
        self.with_xla_cache = self.with_bundle | {
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def compile_bundle(self, jobs: int) -> float:
        """Seconds that it takes."""
        file = self.folder / "plans.toml"
        file.write_text(plans())
        start = time.perf_counter()
        command = "from jax_flashcute.cli.main import main; raise SystemExit(main())"
        arguments = ["compile", file, "--arch", TARGET, "--out", self.bundle, "--jobs", str(jobs)]
        # Compiling keeps kernels in the store too, which must be empty where they are to be met.
        apart = {"JAX_PLATFORMS": "cpu", "JAX_FLASHCUTE_CACHE_DIR": str(self.folder / "compiled")}
        subprocess.run(
            [sys.executable, "-c", command, *arguments], env=self.without | apart, check=True
        )
        return time.perf_counter() - start


def compiler_is_absent(environment: dict[str, str]) -> bool:
    """Whether a process in it cannot import the compiler."""
    code = "import importlib.util; importlib.util.find_spec('cutlass')"
    done = subprocess.run(
        [sys.executable, "-c", f"{code} is None and exit(3)\nimport cutlass"],
        env=environment,
        capture_output=True,
    )
    return done.returncode != 0


# ---- first calls of new shapes ---------------------------------------------------------------


def first_calls(count: int = 12) -> dict[str, Any]:
    """Milliseconds of the first call at shapes not met before, beside an addition's.

    Tracing, lowering, XLA's compiling, loading and running are all in it.
    """
    B, T, N, K, H = _FIRST_CALL
    functions: dict[str, Callable] = {
        "attention": jax.jit(lambda q, k, v: flash_attention(q, k, v, is_causal=True)),
        "addition": jax.jit(lambda q, k, v: q + 1),
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    # The first is the process's own: libraries are loaded and modules imported.
    for i in range(count + 1):
        b, t = B + i % 3, T - 37 * i
        shapes = [(b, t, heads, H) for heads in (N, K, K)]
        arrays = [jnp.full(shape, 0.5, jnp.bfloat16) for shape in shapes]
        jax.block_until_ready(arrays)
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arrays))
            times[name].append((time.perf_counter() - start) * 1e3)
    beyond = [a - b for a, b in zip(*times.values(), strict=True)]
    return {
        "ms": statistics.median(times["attention"][1:]),
        "ms_of_an_addition": statistics.median(times["addition"][1:]),
        "ms_beyond_it": statistics.median(beyond[1:]),
        "ms_beyond_it_at_most": max(beyond[1:]),
        "ms_of_the_first_shape": times["attention"][0],
        "shapes": count,
        "gpu": jax.devices()[0].device_kind,
        "compiler_imported": "cutlass" in sys.modules,
    }


def measure_first_calls(environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.start_up", "--child"],
        env=environment,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


# ---- the server ------------------------------------------------------------------------------


def save_server_model(path: Path) -> None:
    """A model of size "small" with random parameters: what it says does not matter here."""
    sys.path.insert(0, str(REPOSITORY / "examples"))
    from byte_decoder import SIZES, ByteDecoder, save_model
    from flax import nnx

    save_model(path, ByteDecoder(SIZES["small"], jnp.float32, rngs=nnx.Rngs(0)))


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[queue.SimpleQueue]:
    """A process and its lines, None after the last; interrupted at the end."""
    process = subprocess.Popen(
        command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        yield lines
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()


def cold_start(model: Path, environment: dict[str, str], *options: str) -> dict[str, float]:
    """Seconds from the start of examples/serve.py until it listens and until its first token."""
    command = [sys.executable, "examples/serve.py", "--model", str(model), "--port", "0", *options]
    start = time.perf_counter()
    with running(command, environment) as lines:
        while "http://" not in (line := lines.get(timeout=300) or "ended"):
            print(f"  serve: {line.strip()}", file=sys.stderr)
            if line == "ended":
                raise RuntimeError("examples/serve.py ended before it listened")
        listening = time.perf_counter() - start
        body = json.dumps({"prompt": "def main(", "max_tokens": 4}).encode()
        with urllib.request.urlopen(line.split()[0], data=body, timeout=60) as response:
            response.read(1)
            first_token = time.perf_counter() - start
            response.read()
    return {"listening": listening, "first_token": first_token}


# ---- the whole -------------------------------------------------------------------------------


ABSENT = {"compiler": "absent", "compile": "error", "kernels": "bundle"}


def of_first_calls(environments: Environments, options: list[str]) -> Iterator[dict[str, Any]]:
    del options
    yield {"what": "first_call", **ABSENT, **measure_first_calls(environments.with_bundle)}


def of_server(environments: Environments, options: list[str]) -> Iterator[dict[str, Any]]:
    model = environments.folder / "model.safetensors"
    save_server_model(model)
    met = {"kernels": "compiled as they are met"}
    cached = {**ABSENT, "xla_programs": "from JAX's compilation cache"}
    # The first of all reads libraries from a cold disk; the last but one fills JAX's cache.
    for about, environment in (
        (ABSENT, environments.with_bundle),
        (met, environments.without),
        (ABSENT, environments.with_bundle),
        ({**ABSENT, "xla_programs": "put into JAX's cache"}, environments.with_xla_cache),
        (cached, environments.with_xla_cache),
    ):
        yield {"what": "server", **about, **cold_start(model, environment, *options)}


def of_demo(environments: Environments, options: list[str]) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "examples/train_byte_lm.py", *options]
    command += ["--out", str(environments.folder / "demo")]
    start = time.perf_counter()
    done = subprocess.run(command, env=environments.with_bundle, cwd=REPOSITORY)
    seconds = time.perf_counter() - start
    yield {"what": "demo", **ABSENT, "exit_status": done.returncode, "seconds": seconds}


PARTS = {"first_call": of_first_calls, "server": of_server, "demo": of_demo}
TINY = {
    "first_call": [],
    "server": ["--max-batch", "1", "--chunks", "16"],
    "demo": ["--steps", "4"],
}


def measure(
    environments: Environments, parts: list[str], jobs: int, *, tiny: bool
) -> Iterator[dict[str, Any]]:
    """The rows, one by one; a part that fails says so in its row and stops no other."""
    seconds = environments.compile_bundle(jobs)
    if not compiler_is_absent(environments.with_bundle):
        raise RuntimeError("the compiler can be imported where it should be absent")
    kernels = len(list(environments.bundle.glob(f"*{SUFFIX}")))
    yield {"what": "bundle", "seconds": seconds, "kernels": kernels, "jobs": jobs}
    for part in parts:
        try:
            yield from PARTS[part](environments, TINY.get(part, []) if tiny else [])
        except Exception as error:
            yield {"what": part, "error": f"{type(error).__name__}: {error}"}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what was measured, with which kernels, and the figures by name."""
    known = ("what", "kernels", "compiler", "compile", "date", "commit", "jax", "gpu")
    lines = ["| what | kernels | figures |", "|---|---|---|"]
    for row in rows:
        figures = [
            f"{name.replace('_', ' ')} {value:.2f}" if isinstance(value, float) else
            f"{name.replace('_', ' ')} {value}"
            for name, value in row.items() if name not in known
        ]  # fmt: skip
        kernels = row.get("kernels", "")
        kernels = f"{kernels}, no compiler" if row.get("compiler") == "absent" else f"{kernels}"
        lines.append(f"| {row['what'].replace('_', ' ')} | {kernels} | {', '.join(figures)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--tiny", action="store_true", help="few steps: to try it on a CPU")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(first_calls()))
        return 0
    if importlib.util.find_spec("cutlass") is None:
        sys.exit("The compiler is needed to make the bundle.")
    jax.config.update("jax_platforms", "cpu")  # the GPU is for the processes that are measured
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "jax": jax.__version__,
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        environments = Environments(Path(folder))
        parts = options.parts.split(",")
        for row in measure(environments, parts, options.jobs, tiny=options.tiny):
            rows.append(row | about)
            print(json.dumps(row), flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return any("error" in row for row in rows)


if __name__ == "__main__":
    sys.exit(main())
