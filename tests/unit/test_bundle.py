"""Bundles: what a machine without a compiler runs, and which it refuses."""

import json
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from jax_flashcute.ffi import bundle, kernel_file, store, toolchain
from jax_flashcute.ffi.bundle import Bundle, BundleRefusedError
from jax_flashcute.ffi.compile import CompiledKernel
from tests.unit.test_store import KEY, Compiler, compiler, directory, make_key, object_of

__all__ = ["compiler", "directory"]  # fixtures; the store is empty

OTHER = make_key(scale=0.5)


@pytest.fixture(autouse=True)
def no_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(bundle.BUNDLE_VARIABLE, raising=False)
    bundle.installed.cache_clear()
    bundle._opened.cache_clear()


def make_bundle(path: Path, made_by: toolchain.Toolchain | None = None) -> Path:
    """A bundle that holds ``KEY``."""
    made_by = made_by or toolchain.toolchain()
    path.mkdir(exist_ok=True)
    bundle.write_manifest(path, made_by, ["sm_90a:132"])
    content = kernel_file.pack(KEY, CompiledKernel(object_of(KEY), KEY.arch), made_by)
    kernel_file.write(Bundle.open(path).file(KEY), content)
    return path


def test_a_bundle_serves_what_it_has(
    compiler: Compiler, tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "empty", make_bundle(tmp_path / "bundle")]
    paths[0].mkdir()
    bundle.write_manifest(paths[0], toolchain.toolchain(), [])
    monkeypatch.setenv(bundle.BUNDLE_VARIABLE, ":".join(map(str, paths)))
    monkeypatch.setenv(store.COMPILE_VARIABLE, "error")
    assert store.get(KEY).object == object_of(KEY)
    assert store.reasons_against(KEY) == []
    with pytest.raises(store.KernelNotCompiledError, match=r"empty, .*bundle, .*store have no"):
        store.get(OTHER)
    monkeypatch.setenv(store.COMPILE_VARIABLE, "jit")
    store.get(OTHER)
    assert compiler.keys == [OTHER]
    assert [p.stem for p in directory.glob(f"*{store.SUFFIX}")] == [store.entry_name(OTHER)]


def test_a_relative_path_is_that_of_the_first_directory(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bundle(tmp_path / "bundle")
    monkeypatch.setenv(bundle.BUNDLE_VARIABLE, "bundle")
    monkeypatch.chdir(tmp_path)
    assert [found.path for found in bundle.named()] == [tmp_path.resolve() / "bundle"]
    monkeypatch.chdir("/")
    assert store.get(KEY).object == object_of(KEY)
    assert compiler.keys == []


@pytest.mark.parametrize("runtime", [True, False])
def test_where_the_compiler_is_absent(
    runtime: bool, compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime library is of a version of its own distribution, or of none."""
    path = make_bundle(tmp_path / "bundle")
    found = toolchain.toolchain().dsl if runtime else None
    monkeypatch.setattr(
        toolchain, "version", lambda name: found if name == toolchain.RUNTIME else None
    )
    toolchain.toolchain.cache_clear()
    monkeypatch.setenv(bundle.BUNDLE_VARIABLE, str(path))
    monkeypatch.setenv(store.COMPILE_VARIABLE, "error")
    try:
        assert toolchain.toolchain().dsl == found
        assert store.get(KEY).object == object_of(KEY)
    finally:
        monkeypatch.undo()
        toolchain.toolchain.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dsl": "4.7.0"}, "compiled by nvidia-cutlass-dsl 4.7.0, and 4.* is installed"),
        ({"sources": "0" * 64}, "from other sources of jax_flashcute .000000000000, and "),
        ({"machine": "riscv64"}, "for riscv64 hosts, and this one is "),
    ],
)
def test_another_toolchains_bundle_is_refused(
    change: dict, message: str, compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_bundle(tmp_path / "bundle", replace(toolchain.toolchain(), **change))
    monkeypatch.setenv(bundle.BUNDLE_VARIABLE, str(path))
    with pytest.raises(BundleRefusedError, match=f"{path} is refused: .*{message}"):
        store.get(KEY)
    with pytest.raises(BundleRefusedError, match=f"{path} cannot be added to: .*"):
        bundle.write_manifest(path, toolchain.toolchain(), ["sm_90a:132"])


@pytest.mark.parametrize("damage", ["absent", "{", "{}", '{"format": "bundle 99"}'])
def test_a_directory_that_is_no_bundle(
    damage: str, compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_bundle(tmp_path / "bundle")
    if damage == "absent":
        (path / bundle.MANIFEST).unlink()
    else:
        (path / bundle.MANIFEST).write_text(damage)
    monkeypatch.setenv(bundle.BUNDLE_VARIABLE, str(path))
    with pytest.raises(BundleRefusedError, match=f"the bundle {path}"):
        store.get(KEY)


def test_a_damaged_kernel_is_compiled(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Bundle.open(make_bundle(tmp_path / "bundle")).file(KEY)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    monkeypatch.setenv(bundle.BUNDLE_VARIABLE, str(path.parent))
    with pytest.warns(UserWarning, match=f"{path} is damaged") as caught:
        assert store.get(KEY).object == object_of(KEY)
    assert (len(caught), compiler.keys) == (1, [KEY])


def make_wheel(path: Path, made_by: toolchain.Toolchain | None = None) -> Path:
    """Where a wheel of a bundle is installed."""
    made = Bundle.open(make_bundle(path / "bundle", made_by))
    wheel = bundle.write_wheel(made, path / "wheels", "kernels-of-mine", "1.2.dev3")
    assert wheel.name == (f"kernels_of_mine-1.2.dev3-py3-none-linux_{made.toolchain.machine}.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(path / "site")
    return path / "site"


def test_an_installed_wheel_is_found(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(make_wheel(tmp_path))
    monkeypatch.setenv(store.COMPILE_VARIABLE, "error")
    assert store.get(KEY).object == object_of(KEY)
    assert "kernels_of_mine" not in sys.modules


def test_a_stale_wheel_is_warned_of_once(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_wheel(tmp_path, replace(toolchain.toolchain(), dsl="4.7.0"))
    monkeypatch.syspath_prepend(site)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for key in (KEY, OTHER):
            store.get(key)
    assert ["4.7.0" in str(warning.message) for warning in caught] == [True]
    assert compiler.keys == [KEY, OTHER]


@pytest.mark.parametrize(
    ("name", "version"), [("../x", "1"), ("", "1"), ("x", "1/2"), ("x", "new")]
)
def test_names_that_are_no_wheels(name: str, version: str, tmp_path: Path) -> None:
    made = Bundle.open(make_bundle(tmp_path / "bundle"))
    with pytest.raises(ValueError, match="must be"):
        bundle.write_wheel(made, tmp_path, name, version)


def test_a_manifest_gathers_targets(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "bundle")
    bundle.write_manifest(path, toolchain.toolchain(), ["sm_100a:148"])
    assert json.loads((path / bundle.MANIFEST).read_text())["targets"] == [
        "sm_100a:148",
        "sm_90a:132",
    ]
