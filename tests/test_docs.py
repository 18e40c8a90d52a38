"""The examples of docs/attention.md run, one after the other, and its commands are understood."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from striate.lib.cli import parse

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "attention.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.+?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.long
def test_the_examples_run():
    examples = [text for language, text in BLOCKS if language == "python"]
    assert len(examples) >= 10
    done = subprocess.run([sys.executable, "-c", "\n".join(examples)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("line", [line for language, text in BLOCKS if not language for line in text.splitlines()])
def test_commands_are_understood(line):
    assert parse(shlex.split(line)[1:])
