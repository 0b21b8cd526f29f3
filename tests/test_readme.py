"""The code of the README runs and does what the text says."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number, optax_promotion):
    namespace = {}
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), namespace)
    if "values" in namespace:
        assert namespace["values"].mean() < 0.01


def test_there_are_blocks():
    assert BLOCKS
