"""The code of the documentation runs, page by page, from top to bottom."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = {"docs/flax.md": 3, "docs/masks.md": 4, "docs/serving.md": 1, "docs/sharding.md": 3}
"""Pages and how many blocks of code they have at least."""


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL)
    assert len(blocks) >= PAGES[page]
    exec(compile("\n".join(blocks), page, "exec"), {})
