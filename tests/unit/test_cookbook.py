"""The code of the documentation runs, page by page, from top to bottom."""

import os
import re
from pathlib import Path
from unittest import mock

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"))
    if "```python\n" in path.read_text()
)


def test_pages_with_code_are_found() -> None:
    assert {"README.md", "docs/masks.md", "docs/sharding.md", "docs/start.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)
    with mock.patch.dict(os.environ):
        exec(compile("\n".join(blocks), page, "exec"), {})
