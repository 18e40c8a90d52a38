"""What the README tells a newcomer to type works as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from striate.lib.cli import parse

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.+?)^```", README, re.DOTALL | re.MULTILINE)
TYPED = "".join(text for language, text in BLOCKS if not language).replace("\\\n", "")
COMMANDS = re.findall(r"^(?:\$ |\.venv/bin/)?(striate .+)$", TYPED, re.MULTILINE) + re.findall(
    r"`(striate .+?)`", README
)


@pytest.mark.parametrize("line", [line for line in COMMANDS if "FILE" not in line and "--help" not in line])
def test_commands_are_understood(line):
    assert parse(shlex.split(line)[1:])


def test_commands_were_found():
    assert {"train", "evaluate", "generate", "show"} <= {line.split()[1] for line in COMMANDS}


def test_the_snippet_gives_the_same_result_around_the_ring():
    (snippet,) = (text for language, text in BLOCKS if language == "python")
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=True)
    assert 0 <= float(done.stdout) < 1e-6


def test_links_and_pictures_are_there():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert len(targets) >= 4 and all((ROOT / target).is_file() for target in targets)
