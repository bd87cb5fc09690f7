"""Calls drawn at random on a GPU, against the reference.

``OMP_NUM_THREADS=1 JAX_FLASHCUTE_RANDOM=600 pytest -m gpu -n 16 --dist worksteal
tests/kernels/test_random_calls_gpu.py`` runs so many, from ``JAX_FLASHCUTE_RANDOM_FIRST`` on.  Most
of a test is to compile its kernels.
"""

import pytest

from tests.random_calls import check, numbers, random_call


@pytest.mark.gpu
@pytest.mark.parametrize("number", numbers(32))
def test_random_calls(number: int) -> None:
    call = random_call(number)
    print(call)
    check(call)
