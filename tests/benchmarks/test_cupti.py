"""The reader of CUPTI's records, against a stand-in library that hands them over as CUPTI does."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.cupti import (
    CONCURRENT_KERNEL,
    MEMCPY,
    MEMSET,
    Activity,
    CuptiError,
    DeviceTimeline,
)

MARKER = 12  # CUPTI_ACTIVITY_KIND_MARKER: no device activity


@pytest.fixture
def library(tmp_path: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in library")
    path = tmp_path / "libcupti.so"
    source = Path(__file__).with_name("fake_cupti.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, source], check=True)
    return path


@pytest.fixture
def record(library: Path):
    fake = ctypes.CDLL(str(library)).fake_record
    fake.argtypes = [ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_char_p]
    return fake


def test_activities_come_sorted_and_once(library: Path, record) -> None:
    timeline = DeviceTimeline(library)
    names = [f"kernel_{i}".encode() for i in range(7)]
    for i in reversed(range(7)):
        record(CONCURRENT_KERNEL, 1000 + 10 * i, 1008 + 10 * i, names[i])
    activities = timeline.read()
    assert activities == [
        Activity(1000 + 10 * i, 1008 + 10 * i, names[i].decode()) for i in range(7)
    ]
    assert timeline.read() == []


def test_copies_and_fills_count_and_the_rest_does_not(library: Path, record) -> None:
    timeline = DeviceTimeline(library)
    record(MEMCPY, 1, 2, None)
    record(MEMSET, 3, 4, None)
    record(MARKER, 5, 6, None)
    record(CONCURRENT_KERNEL, 7, 0, b"unfinished")
    assert timeline.read() == [Activity(1, 2, "memcpy"), Activity(3, 4, "memset")]


def test_times_keep_all_their_bits(library: Path, record) -> None:
    timeline = DeviceTimeline(library)
    start = 1_790_000_000_000_000_123
    record(CONCURRENT_KERNEL, start, start + 1, b"k")
    assert timeline.read() == [Activity(start, start + 1, "k")]


def test_refusal_says_what_and_why(library: Path) -> None:
    ctypes.CDLL(str(library)).fake_refuse(1)
    with pytest.raises(CuptiError, match=r"cuptiActivityEnable.*CUPTI_ERROR_INVALID_PARAMETER"):
        DeviceTimeline(library)


def test_missing_library(tmp_path: Path) -> None:
    with pytest.raises(CuptiError, match="cannot be loaded"):
        DeviceTimeline(tmp_path / "libcupti.so")
