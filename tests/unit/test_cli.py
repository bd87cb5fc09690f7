"""``jax-flashcute``, run as users run it, with the real compiler once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jax_flashcute import plan
from jax_flashcute.cli import ahead, kernels
from jax_flashcute.cli.main import main
from jax_flashcute.ffi import bundle, kernel_file, store, toolchain
from jax_flashcute.kernels import registry
from jax_flashcute.kernels.key import KernelKey
from tests.unit.test_store import KEY, compiler, directory, make_key

__all__ = ["compiler", "directory"]  # fixtures; the store is empty

REPOSITORY = Path(__file__).resolve().parents[2]

PLANS = """
[[call]]
query = "bfloat16[2,300,4,64]"
key = "bfloat16[2,500,2,64]"
value = "bfloat16[2,500,2,64]"
local_window_size = [100, inf]
mask_mod = "tests.unit.test_cli:odd_keys"
"""


def odd_keys(b, h, q_idx, kv_idx):
    return kv_idx % 2 == 1


@pytest.fixture(autouse=True)
def no_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(bundle.BUNDLE_VARIABLE, raising=False)
    monkeypatch.delenv(plan.ARCH_VARIABLE, raising=False)
    bundle.installed.cache_clear()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


WITHOUT_COMPILER = """
import sys
class NoCompiler:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cutlass", "cuda"):
            raise ImportError(f"{name} is absent")
sys.meta_path.insert(0, NoCompiler())
from importlib import metadata
version = metadata.version
def installed(name):
    if name == "nvidia-cutlass-dsl":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = installed
import jax, jax.numpy as jnp
from jax_flashcute import flash_attention
from jax_flashcute.ffi import store
from tests.unit.test_cli import odd_keys
query = jax.ShapeDtypeStruct((3, 300, 6, 64), jnp.bfloat16)
key = jax.ShapeDtypeStruct((3, 77, 3, 64), jnp.bfloat16)
def attend(query, key, value):
    return flash_attention(
        query, key, value, mask_mod=odd_keys, local_window_size=(100, None), implementation="cute"
    )
text = jax.jit(attend).trace(query, key, key).lower(lowering_platforms=("cuda",)).as_text()
print("CuteDSLRT_NvJaxCutlassCall_v2" in text, store.compiles())
"""


def test_compiled_here_and_run_without_a_compiler(
    tmp_path: Path, directory: Path, capfd: pytest.CaptureFixture
) -> None:
    """For other lengths and head counts than were asked for; and its registers are printed."""
    out, environment = tmp_path / "bundle", os.environ | {"PYTHONPATH": str(REPOSITORY)}
    plans = write(tmp_path / "plans.toml", PLANS)
    subprocess.run(
        [
            *(sys.executable, "-c", "from jax_flashcute.cli.main import main; main()"),
            *("compile", plans, "--arch", "sm_90a", "--out", out, "--jobs", "1"),
        ],
        cwd=REPOSITORY,
        env=environment,
        check=True,
        timeout=300,
    )
    assert "1 kernels wanted, 0 problems" in capfd.readouterr().out
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER],
        env=environment
        | {
            bundle.BUNDLE_VARIABLE: str(out),
            store.COMPILE_VARIABLE: "error",
            store.CACHE_VARIABLE: str(tmp_path / "nothing"),
            plan.ARCH_VARIABLE: "sm_90a",
        },
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "True 0\n", done.stderr

    assert main(["inspect", "--opcodes", "99", "--bundle", str(out)]) == 0
    printed = capfd.readouterr().out
    for expected in ("sm90_forward for sm_90a", "registers a thread: 1", "shared memory", "HGMMA"):
        assert expected in printed
    assert main(["list", "--bundle", str(out)]) == 0
    assert "q - 100 <= kv" in capfd.readouterr().out


def run_compile(path: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list]:
    """The exit status, and the jobs instead of what they compile."""
    jobs: list[ahead.Job] = []

    def collect(given, processes):
        jobs.extend(given)
        return []

    monkeypatch.setattr(ahead, "_compile_all", collect)
    return main(["compile", str(path), *arguments]), jobs


def test_each_pass_and_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """What no kernel serves is said, and the rest is compiled; arrays share names of lengths."""
    path = write(
        tmp_path / "plans.toml",
        """
[[call]]
passes = ["fwd", "bwd"]
query = "float16[b,300,7,64]"
key = "float16[b,s,1,64]"
value = "float16[b,s,1,64]"
q_offset = "int32[b]"
is_causal = true
""",
    )
    served, refused = ("sm_90a:114", "sm_100a:148", "sm_103a:160"), ("sm_80", "sm_120a")
    options = [x for target in (*served, *refused) for x in ("--arch", target)]
    status, jobs = run_compile(path, *options, monkeypatch=monkeypatch)
    assert status == 1
    assert [(job.target, job.table["direction"]) for job in jobs] == [
        (target, direction) for target in served for direction in ("fwd", "bwd")
    ]
    problems = capsys.readouterr().err
    for target in refused:
        assert f"call 1 for {target}" in problems
        assert f"not for {target}" in problems


def soften(score, b, h, q_idx, kv_idx):
    return jax.nn.softplus(score)


ARRAYS = "".join(f'{name} = "bfloat16[2,64,4,64]"\n' for name in ("query", "key", "value"))


@pytest.mark.parametrize(
    ("options", "directions", "message"),
    [
        (
            'function = "dot_product_attention"\npasses = ["fwd", "bwd"]\n' + ARRAYS,
            ["fwd"],
            "call 1 for sm_90a: its backward pass calls no kernel",
        ),
        (
            'score_mod = "tests.unit.test_cli:soften"\n' + ARRAYS,
            [],
            "a plan for sm_90a: .*cannot be written to a file",
        ),
    ],
)
def test_kernels_that_there_are_not(
    options: str,
    directions: list,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    monkeypatch.setattr(registry, "reasons_against_gradients", lambda *call: ["no kernel"])
    path = write(tmp_path / "plans.toml", f"[[call]]\n{options}")
    arguments = ("--arch", "sm_90a", "--out", str(tmp_path / "out"))
    status, jobs = run_compile(path, *arguments, monkeypatch=monkeypatch)
    assert (status, [job.table["direction"] for job in jobs]) == (1, directions)
    assert re.search(message, capsys.readouterr().err)


def test_a_job_is_compiled_into_the_store_and_the_bundle(
    compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    path = write(tmp_path / "plans.toml", PLANS)
    _, (job,) = run_compile(
        path, "--arch", "sm_90a", "--out", str(tmp_path / "out"), monkeypatch=monkeypatch
    )
    for name in (plan.ARCH_VARIABLE, store.COMPILE_VARIABLE, "JAX_PLATFORMS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # to be restored
    ahead.compile_job(job)
    (key,) = compiler.keys
    made = bundle.Bundle.open(tmp_path / "out")
    assert made.file(key) == made.files()[0]
    assert store.contains(key)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('query = "bfloat16[2,300,4,64"', "flash_attention"),
        ('query = "bf[2]"', "'bf' is no dtype"),
        ("passes = []", "passes must be"),
        ('passes = [["fwd"]]', "passes must be"),
        ("function = 3", "function must be one of flash_attention, "),
        ('function = "attention"', "function must be one of flash_attention, "),
        ('function = "absent:attention"', "'absent:attention' cannot be imported"),
    ],
)
def test_calls_that_are_none(table: str, message: str, tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "plans.toml", f"[[call]]\n{table}\n")
    assert main(["compile", str(path), "--arch", "sm_90a"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wheel", "x"], "--wheel needs --out"),
        (["--wheel", "9x", "--out", "."], "name must be that of a distribution, got '9x'"),
        (["--host", "aarch64"], "--host needs --out"),
        (["--jobs", "0"], "--jobs must be positive, got 0"),
        (["--arch", "sm_90a:many"], "JAX_FLASHCUTE_ARCH must be an architecture"),
        ([], "there is no CUDA device here"),
    ],
)
def test_options_that_do_not_fit(
    arguments, message: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not arguments:
        monkeypatch.setattr(plan, "target", lambda: None)
    path = write(tmp_path / "plans.toml", PLANS)
    assert main(["compile", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_listed_and_cleared(compiler, directory: Path, capsys) -> None:
    keys: list[KernelKey] = [KEY, make_key(scale=0.5)]
    for key in keys:
        store.get(key)
    stale = directory / f"{'0' * 64}{store.SUFFIX}"
    old = toolchain.Toolchain("4.7.0", "0" * 64, "x86_64")
    stale.write_bytes(kernel_file.pack(KEY, store.get(KEY), old))
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("sm90_forward") == 3
    assert printed.count("of another toolchain") == 1
    assert f"3 kernels in {directory}" in printed
    assert main(["clear", "--stale"]) == 0
    assert not stale.exists()
    assert len(list(directory.glob(f"*{store.SUFFIX}"))) == 2
    assert main(["clear"]) == 0
    assert list(directory.iterdir()) == []
    assert main(["inspect", "0"]) == 2
    assert "no kernel is named 0" in capsys.readouterr().err


def test_doctor(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv(plan.ARCH_VARIABLE, "sm_90a:114")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for expected in ("planned for sm_90a:114", "kernels can be compiled", f"{directory} can be"):
        assert expected in printed
    monkeypatch.setenv(bundle.BUNDLE_VARIABLE, str(tmp_path / "absent"))
    assert main(["doctor"]) == 1
    assert "[broken] JAX_FLASHCUTE_BUNDLE can be used" in capsys.readouterr().out


def test_doctor_goes_on(directory: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv(plan.ARCH_VARIABLE, "sm_80")
    assert main(["doctor"]) == 0
    assert "[  no  ] kernels are planned for sm_80" in capsys.readouterr().out
    monkeypatch.setenv(plan.ARCH_VARIABLE, "sm_90a:x")
    monkeypatch.setenv(store.COMPILE_VARIABLE, "foo")
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    for variable in (plan.ARCH_VARIABLE, store.COMPILE_VARIABLE):
        assert re.search(rf"\[broken\] .*ValueError: {variable} must be", printed)
    for expected in ("JAX sees", f"{directory} can be", "this toolchain", "jax_flashcute.nn"):
        assert expected in printed


def test_an_object_without_gpu_code() -> None:
    with pytest.raises(ValueError, match="no GPU code"):
        kernels.cubin_of(store.CompiledKernel(b"\x7fELF" + bytes(100), "sm_90a"))
