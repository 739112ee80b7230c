# SPDX-License-Identifier: Apache-2.0
"""Every command and every example in README.md and CONTRIBUTING.md is real."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))
KNOWN_COMMANDS = {"make", "headkv-mm", "pip", "python"}


def blocks(document: str, language: str) -> list[str]:
    """Returns the fenced blocks of one language in a document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Returns the words of every command, continuation lines joined."""
    lines = "\n".join(block for name in DOCUMENTS for block in blocks(name, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_every_command_is_of_a_kind_that_is_checked_here() -> None:
    words = {command[0] for command in commands()}
    assert {"make", "headkv-mm"} <= words <= KNOWN_COMMANDS


def test_every_make_target_exists() -> None:
    named = {word for command in commands() if command[0] == "make" for word in command[1:] if "=" not in word}
    prose = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS)
    inline = set(re.findall(r"`make ([a-z]+)", prose))
    assert named
    assert named | inline <= make_targets()


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make ([a-z]+)", shown, flags=re.MULTILINE)) == make_targets()


def test_every_headkv_mm_line_parses() -> None:
    from headkv_mm.cli import build_parser

    lines = [command[1:] for command in commands() if command[0] == "headkv-mm"]
    assert lines
    for line in lines:
        build_parser().parse_args(line)  # exits with an error on what it does not know


def test_the_demo_in_the_makefile_is_the_commands_in_the_readme() -> None:
    recipe = re.search(r"^demo:.*?\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert recipe
    demo = [shlex.split(line) for line in recipe[1].replace("\\\n", " ").splitlines()]
    assert len(demo) == 2
    shown = [command[1:] for command in commands() if command[0] == "headkv-mm"]
    assert all(command[1:] in shown for command in demo)


def test_links_lead_somewhere() -> None:
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


@pytest.mark.slow
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if blocks(name, "python")])
def test_the_examples_run(document: str, tmp_path: Path) -> None:
    # One process per document: an example may go on from the one before it.
    code = "\n".join(blocks(document, "python"))
    assert code
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
