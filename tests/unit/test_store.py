"""Compiled kernels on disk: what may go wrong with a disk, and with processes that share it."""

import ast
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import explain, flash_attention, plan
from jax_flashcute.analysis import window_interval
from jax_flashcute.bounds import RowBounds
from jax_flashcute.ffi import kernel_file, store, toolchain
from jax_flashcute.ffi.compile import CompiledKernel
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.elements import ElementFunctions
from jax_flashcute.kernels.key import KernelKey
from jax_flashcute.spec import AttentionSpec, Operands

REPOSITORY = Path(__file__).resolve().parents[2]
ARCH = "sm_90a"


def make_key(**changes) -> KernelKey:
    query = jax.ShapeDtypeStruct((2, 300, 4, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((2, 300, 2, 64), jnp.bfloat16)
    operands = Operands(query=query, key=key, value=key)
    return replace(registry.kernel_key(AttentionSpec(0.125), operands, "fwd", ARCH, 132), **changes)


KEY = make_key()


def object_of(key: KernelKey) -> bytes:
    """Stands in for an object: its bytes depend on the whole key, and hold nothing compressible."""
    return np.random.default_rng(list(repr(key).encode())).bytes(50_000)


def stand_in_compile(key: KernelKey) -> CompiledKernel:
    return CompiledKernel(object_of(key), key.arch)


class Compiler:
    """Stands in for the compiler, and counts."""

    def __init__(self):
        self.keys: list[KernelKey] = []

    def __call__(self, key: KernelKey) -> CompiledKernel:
        self.keys.append(key)
        return stand_in_compile(key)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, and nothing in memory."""
    monkeypatch.setenv(store.CACHE_VARIABLE, str(tmp_path / "store"))
    monkeypatch.delenv(store.COMPILE_VARIABLE, raising=False)
    monkeypatch.setattr(store, "_warned", set())
    monkeypatch.setattr(store, "_memory", {})
    return tmp_path / "store"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    compiler = Compiler()
    monkeypatch.setattr(store, "_compile", compiler)
    return compiler


def entry(directory: Path) -> Path:
    """The only entry of a store."""
    (path,) = directory.glob(f"*{store.SUFFIX}")
    return path


def start_python(code: str, directory: Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | {store.CACHE_VARIABLE: str(directory)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


# ---- one process ---------------------------------------------------------------------------


def test_compiled_once_then_from_memory_then_from_disk(compiler, directory: Path) -> None:
    first = store.get(KEY)
    assert first.object == object_of(KEY)
    assert store.get(KEY) is first
    store.forget()
    again = store.get(KEY)
    assert again is not first
    assert (again.object, again.arch, again.digest) == (first.object, ARCH, first.digest)
    assert compiler.keys == [KEY]
    assert not list(directory.glob(f"*{store.PART_SUFFIX}"))


def test_contains(compiler) -> None:
    assert not store.contains(KEY)
    store.get(KEY)
    assert store.contains(KEY)
    store.forget()
    assert store.contains(KEY)
    assert not store.contains(make_key(scale=0.5))
    assert compiler.keys == [KEY]


def flip(content: bytearray, where: int) -> bytearray:
    content[where] ^= 1
    return content


DAMAGE = {
    "first byte": lambda c: flip(c, 0),
    "checksum": lambda c: flip(c, len(kernel_file.MAGIC)),
    "first byte of the payload": lambda c: flip(c, len(kernel_file.MAGIC) + 32),
    "middle": lambda c: flip(c, len(c) // 2),
    "last byte": lambda c: flip(c, len(c) - 1),
    "cut by a byte": lambda c: c[:-1],
    "cut in half": lambda c: c[: len(c) // 2],
    "cut in the checksum": lambda c: c[: len(kernel_file.MAGIC) + 7],
    "empty": lambda c: c[:0],
    "lengthened": lambda c: c + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_compiled_again(damage, compiler, directory: Path) -> None:
    store.get(KEY)
    path = entry(directory)
    whole = path.read_bytes()
    path.write_bytes(damage(bytearray(whole)))
    store.forget()
    with pytest.warns(UserWarning, match="is damaged") as caught:
        assert store.get(KEY).object == object_of(KEY)
    assert len(caught) == 1
    assert compiler.keys == [KEY, KEY]
    assert path.read_bytes() == whole


def test_an_entry_that_cannot_be_read_is_compiled_again(compiler, directory: Path) -> None:
    store.get(KEY)
    path = entry(directory)
    path.unlink()
    path.mkdir()
    store.forget()
    with pytest.warns(UserWarning, match="cannot be"):
        assert store.get(KEY).object == object_of(KEY)
    assert compiler.keys == [KEY, KEY]


def test_without_a_directory_kernels_are_compiled_with_one_warning(
    compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place where nothing can be made, whoever asks: inside a regular file."""
    (tmp_path / "file").touch()
    monkeypatch.setenv(store.CACHE_VARIABLE, str(tmp_path / "file" / "store"))
    keys = [make_key(scale=scale) for scale in (0.25, 0.5)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for key in keys:
            assert store.get(key).object == object_of(key)
            assert store.get(key).object == object_of(key)
    assert compiler.keys == keys
    assert ["cannot be written" in str(warning.message) for warning in caught] == [True]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write where permissions forbid it")
def test_a_directory_without_write_permission(compiler, directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o500)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for scale in (0.25, 0.5):
            store.get(make_key(scale=scale))
    assert ["cannot be written" in str(warning.message) for warning in caught] == [True]


def test_a_read_only_directory_serves_what_it_has(
    compiler, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.get(KEY)
    store.forget()
    real_open = open

    def refuse_writing(path, mode="r", *arguments, **options):
        if "w" in mode and str(path).startswith(str(directory)):
            raise PermissionError(30, "Read-only file system", str(path))
        return real_open(path, mode, *arguments, **options)

    def refuse(*_, **__):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr("builtins.open", refuse_writing)
    monkeypatch.setattr(kernel_file.tempfile, "NamedTemporaryFile", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.get(KEY).object == object_of(KEY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for scale in (0.25, 0.5):
            store.get(make_key(scale=scale))
    assert ["cannot be written" in str(warning.message) for warning in caught] == [True]
    assert len(compiler.keys) == 3


def take_at_most(size: int) -> None:
    """Lets this process write no file beyond ``size`` bytes: a disk that runs full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk(directory: Path) -> None:
    """The kernel is used, nothing of it stays, and what fits is kept as before."""
    code = """
import warnings
from tests.unit import test_store as t
store = t.store
store._compile = t.stand_in_compile
t.take_at_most(4096)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for scale in (0.25, 0.5):
        key = t.make_key(scale=scale)
        assert store.get(key).object == t.object_of(key)
print(len(caught), caught[0].message)
t.take_at_most(-1)
store.get(t.KEY)
print(store.entry_name(t.KEY))
"""
    printed = finish(start_python(code, directory))
    assert printed.startswith("1 jax_flashcute:")
    assert "cannot be written" in printed
    assert not list(directory.glob(f"*{store.PART_SUFFIX}"))
    assert entry(directory).stem == printed.split()[-1]


# ---- modes ---------------------------------------------------------------------------------


def test_jit_is_the_default() -> None:
    assert store.compile_mode() == "jit"


@pytest.mark.parametrize("mode", ["aot", "error"])
def test_nothing_is_compiled_where_that_is_forbidden(
    mode: str, compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_key(scale=0.5)
    store.get(other)
    store.forget()
    monkeypatch.setenv(store.COMPILE_VARIABLE, mode)
    with pytest.raises(store.KernelNotCompiledError, match=f"{mode} and .* has no compiled"):
        store.get(KEY)
    assert store.get(other).object == object_of(other)
    assert compiler.keys == [other]


def test_an_unknown_mode_is_refused(compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(store.COMPILE_VARIABLE, "never")
    with pytest.raises(ValueError, match="must be one of jit, aot, error, got 'never'"):
        store.get(KEY)
    assert compiler.keys == []


# ---- names ---------------------------------------------------------------------------------

CHANGES = {
    "kernel": "another",
    "arch": "sm_100a",
    "dtype": "float16",
    "head_dim": 72,
    "head_dim_v": 72,
    "group": 1,
    "pack_gqa": True,
    "split_kv": True,
    "scale": 0.1250000001,
    "interval": window_interval(None, 0),
    "optional": ("q_offset",),
    "config": replace(KEY.config, tile_n=112),
    "num_sms": 114,
    "elements": ElementFunctions(soft_cap=30.0),
    "page_size": 16,
    "batch_invariant": True,
    "row_bounds": RowBounds(compares_ids=False, has_positions=True),
    "has_lists": True,
    "packed_mask": "bt",
    "union": (window_interval(3, 0), window_interval(None, -9)),
}


def test_a_name_says_the_whole_plan() -> None:
    assert CHANGES.keys() == vars(KEY).keys()
    names = {store.entry_name(replace(KEY, **{field: x})) for field, x in CHANGES.items()}
    assert store.entry_name(KEY) == store.entry_name(make_key())
    assert len(names | {store.entry_name(KEY)}) == len(CHANGES) + 1


def test_every_plan_can_be_written() -> None:
    for field, value in CHANGES.items():
        key = replace(KEY, **{field: value})
        content = kernel_file.pack(key, stand_in_compile(key), toolchain.toolchain())
        description, kernel = kernel_file.unpack(content)
        assert kernel.object == object_of(key)
        assert description.keys() >= vars(key).keys()


def test_a_name_changes_with_the_toolchain(monkeypatch: pytest.MonkeyPatch) -> None:
    before = store.entry_name(KEY)
    monkeypatch.setattr(toolchain, "version", lambda name: "99.0")
    toolchain.toolchain.cache_clear()
    try:
        assert store.entry_name(KEY) != before
    finally:
        monkeypatch.undo()
        toolchain.toolchain.cache_clear()


def test_sources_are_all_that_kernels_import() -> None:
    package = Path(registry.__file__).parent.parent
    sources = {path for pattern in toolchain.SOURCES for path in package.glob(pattern)}
    assert all(list(package.glob(pattern)) for pattern in toolchain.SOURCES)
    for path in package.glob("kernels/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            modules = [node.module]
            if node.module == "jax_flashcute":
                modules = [f"jax_flashcute.{alias.name}" for alias in node.names]
            for module in modules:
                place = package.parent.joinpath(*module.split("."))
                files = set(place.glob("**/*.py")) or {place.with_suffix(".py")}
                assert not module.startswith("jax_flashcute") or files <= sources, (path, module)


@pytest.mark.parametrize("change", ["edited", "added", "renamed", "analysis", "bounds"])
def test_a_name_changes_with_the_kernels_sources(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    for folder in ("kernels", "kernels/sm90", "ffi", "analysis"):
        (package / folder).mkdir(parents=True, exist_ok=True)
    source = package / "kernels" / "sm90" / "forward.py"
    source.write_text("x = 1\n")

    def name() -> str:
        toolchain.toolchain.cache_clear()
        return store.entry_name(KEY)

    monkeypatch.setattr(registry, "__file__", str(package / "kernels" / "registry.py"))
    try:
        before = name()
        assert name() == before
        match change:
            case "edited":
                source.write_text("x = 2\n")
            case "added":
                (package / "ffi" / "new.py").touch()
            case "analysis":
                (package / "analysis" / "integers.py").write_text("LIMIT = 1\n")
            case "bounds":
                (package / "bounds.py").write_text("LIMIT = 1\n")
            case "renamed":
                source.rename(source.with_name("other.py"))
        assert name() != before
    finally:
        monkeypatch.undo()
        toolchain.toolchain.cache_clear()


def test_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(store.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert store.directory() == Path("/some/cache/jax_flashcute")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/some/home")
    assert store.directory() == Path("/some/home/.cache/jax_flashcute")


# ---- several processes ---------------------------------------------------------------------

KILLED = """
import time
from tests.unit import test_store as t
store = t.store
store._compile = t.stand_in_compile
def rename(*_):
    print("written", flush=True)
    time.sleep(600)
t.kernel_file.os.replace = rename
store.get(t.KEY)
"""


def test_a_process_killed_while_writing(compiler, directory: Path) -> None:
    """It held the lock and had written all but the name; its successor is not held up."""
    process = start_python(KILLED, directory)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    assert list(directory.glob(f"*{store.PART_SUFFIX}"))
    assert not store.contains(KEY)
    process.send_signal(signal.SIGKILL)
    process.wait()
    start = time.monotonic()
    assert store.get(KEY).object == object_of(KEY)
    assert time.monotonic() - start < 10
    assert compiler.keys == [KEY]
    assert entry(directory).exists()
    assert not list(directory.glob(f"*{store.PART_SUFFIX}"))


SIXTEEN = """
import os, sys, time
from tests.unit import test_store as t
store = t.store
def compile(key):
    with open(sys.argv[1], "a") as file:
        file.write("compiled\\n")
    time.sleep(0.5)
    return t.stand_in_compile(key)
store._compile = compile
begin = time.time() + 0.5
children = []
for _ in range(16):
    child = os.fork()
    if child == 0:
        time.sleep(max(0, begin - time.time()))
        kernel = store.get(t.KEY)
        os._exit(0 if kernel.object == t.object_of(t.KEY) else 1)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_sixteen_processes_at_once_compile_once(tmp_path: Path, directory: Path) -> None:
    log = tmp_path / "log"
    code = SIXTEEN.replace("sys.argv[1]", repr(str(log)))
    assert finish(start_python(code, directory)) == f"{[0] * 16}\n"
    assert log.read_text() == "compiled\n"
    assert entry(directory).exists()


REAL = """
from tests.unit import test_store as t
kernel = t.store.get(t.KEY)
print(t.store.compiles(), kernel.digest.hex())
"""


def test_compiled_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    """The real compiler, twice, with different hash seeds."""
    directories = [tmp_path / "one", tmp_path / "other"]
    printed = []
    for seed, directory in enumerate(directories):
        printed.append(finish(start_python(REAL, directory, PYTHONHASHSEED=str(seed + 1))))
    assert printed[0] == printed[1]
    assert printed[0].startswith("1 ")
    assert entry(directories[0]).name == entry(directories[1]).name
    assert entry(directories[0]).read_bytes() == entry(directories[1]).read_bytes()
    # And a third process finds what the first one left.
    assert finish(start_python(REAL, directories[0])) == printed[0].replace("1 ", "0 ", 1)


# ---- a call whose kernel was not compiled ahead of time ------------------------------------


def call_of(key: KernelKey):
    """A call of ``flash_attention`` that takes this kernel, and its arrays' shapes."""
    query = jax.ShapeDtypeStruct((2, 300, 4, 64), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, 300, 2, 64), jnp.bfloat16)

    def call(query, key_, value, implementation=None):
        return flash_attention(query, key_, value, scale=key.scale, implementation=implementation)

    return call, (query, kv, kv)


def lowered_for_cuda(key: KernelKey, implementation: str | None = None) -> str:
    call, shapes = call_of(key)
    traced = jax.jit(call, static_argnames="implementation").trace(
        *shapes, implementation=implementation
    )
    return traced.lower(lowering_platforms=("cuda",)).as_text()


TARGET = "CuteDSLRT"


@pytest.fixture
def ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plan.ARCH_VARIABLE, ARCH)
    monkeypatch.setenv(store.COMPILE_VARIABLE, "aot")


@pytest.mark.usefixtures("ahead_of_time")
def test_aot_leaves_what_it_lacks_to_xla(compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TARGET not in lowered_for_cuda(KEY)
    _, shapes = call_of(KEY)
    told = explain(*shapes, scale=KEY.scale)
    assert told.forward == "xla"
    assert len(told.forward_reasons) == 1
    assert "aot and " in told.forward_reasons[0]
    with pytest.raises(NotImplementedError, match="has no compiled kernel for"):
        lowered_for_cuda(KEY, "cute")
    assert compiler.keys == []

    monkeypatch.setenv(store.COMPILE_VARIABLE, "jit")
    store.get(KEY)
    store.forget()
    monkeypatch.setenv(store.COMPILE_VARIABLE, "aot")
    assert lowered_for_cuda(KEY).count(f"@{TARGET}") == 1
    assert explain(*shapes, scale=KEY.scale).forward == "cute"
    assert TARGET not in lowered_for_cuda(make_key(scale=0.5))
    assert compiler.keys == [KEY]


@pytest.mark.usefixtures("ahead_of_time")
def test_aot_serves_each_direction_with_what_there_is(
    compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, shapes = call_of(KEY)

    def calls_in_a_gradient() -> int:
        gradient = jax.jit(jax.grad(lambda *arrays: jnp.sum(call(*arrays)), argnums=(0, 1, 2)))
        lowered = gradient.trace(*shapes).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count(f"@{TARGET}")

    assert calls_in_a_gradient() == 0
    operands = Operands(*shapes)
    for have, direction in enumerate(("bwd", "fwd")):
        monkeypatch.setenv(store.COMPILE_VARIABLE, "jit")
        store.get(registry.kernel_key(AttentionSpec(KEY.scale), operands, direction, ARCH, 132))
        monkeypatch.setenv(store.COMPILE_VARIABLE, "aot")
        assert calls_in_a_gradient() == have + 1
    assert len(compiler.keys) == 2


@pytest.mark.usefixtures("ahead_of_time")
def test_error_mode_refuses_to_lower_what_it_lacks(
    compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(store.COMPILE_VARIABLE, "error")
    for implementation in (None, "cute"):
        with pytest.raises(store.KernelNotCompiledError, match="=error and "):
            lowered_for_cuda(KEY, implementation)
    assert compiler.keys == []


def test_aot_says_nothing_where_no_architecture_is_known(
    compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(store.COMPILE_VARIABLE, "aot")
    monkeypatch.setattr(plan, "target", lambda: None)
    _, shapes = call_of(KEY)
    assert explain(*shapes).forward == "cute"
