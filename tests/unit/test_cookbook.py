"""The code of the documentation runs, page by page, from top to bottom."""

import re

import pytest

from tests.unit.test_imports import REPOSITORY, run_python

PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"))
    if "```python\n" in path.read_text()
)


def test_pages_with_code_are_found() -> None:
    assert {"README.md", "docs/masks.md", "docs/sharding.md", "docs/start.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str) -> None:
    """In its own process: a page may set environment variables, which XLA's threads read."""
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)
    result = run_python("\n".join(blocks), JAX_PLATFORMS="cpu")
    assert result.returncode == 0, result.stderr
