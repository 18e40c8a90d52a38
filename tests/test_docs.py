"""The examples of the pages of docs/ run, one after the other, and the commands are understood."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from striate.lib.cli import parse

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = {"attention": 6, "linear_attention": 6, "gpu_kernels": 1}  # examples, at least
BLOCKS = {
    page: re.findall(r"^```(\w*)\n(.+?)^```", (DOCS / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)
    for page in PAGES
}
LINES = [line for blocks in BLOCKS.values() for language, text in blocks if not language for line in text.splitlines()]


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run(page):
    examples = [text for language, text in BLOCKS[page] if language == "python"]
    assert len(examples) >= PAGES[page]
    done = subprocess.run([sys.executable, "-c", "\n".join(examples)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("line", LINES)
def test_commands_are_understood(line):
    assert parse(shlex.split(line)[1:])
