# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/multi_gpu.md: all are parsed by whoever will read them, and one launch runs as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from headkv_mm.batch.files import read_lines
from headkv_mm.batch.prompts import read_prompts

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "multi_gpu.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def launches() -> list[str]:
    """Every command that starts processes."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [line.removeprefix("srun ") for line in lines if re.match(r"(srun )?(accelerate|torchrun) ", line)]


def program(words: list[str]) -> list[str]:
    """The arguments of headkv-mm behind a launcher's own."""
    if "headkv_mm.cli" in words:
        return words[words.index("headkv_mm.cli") + 1 :]
    first = words.index("scripts/generate_images.py") + 1
    return ["generate", "--prompts", *words[first:]]


@pytest.mark.parametrize("line", launches())
def test_launchers_and_program_know_every_option(line: str) -> None:
    from headkv_mm.cli import build_parser

    words = shlex.split(line.replace("$SLURM_NNODES", "2"))
    if words[0] == "torchrun":
        from torch.distributed.run import parse_args

        found = parse_args(words[1:])
    else:
        from accelerate.commands.launch import launch_command_parser

        assert words[1] == "launch"
        found = launch_command_parser().parse_args(words[2:])
    assert found.module == ("headkv_mm.cli" in words)
    args = build_parser().parse_args(program(words))
    assert args.prompts_file == "prompts.jsonl"


def test_there_are_commands_for_every_place() -> None:
    assert len(launches()) == 5
    assert "## Models larger than one device" in PAGE


def test_the_list_is_read(tmp_path: Path) -> None:
    (text,) = blocks("json")
    (tmp_path / "prompts.jsonl").write_text(text)
    found = read_prompts(str(tmp_path / "prompts.jsonl"))
    assert [prompt.id for prompt in found.prompts] == ["lighthouse", "ring", "00003"]
    assert not found.bad


@pytest.mark.slow
def test_the_launch_on_the_cpu_runs_as_it_stands(tmp_path: Path) -> None:
    (line,) = [line for line in launches() if "--device cpu" in line]
    (tmp_path / "prompts.jsonl").write_text(blocks("json")[0])
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "3 images in images, 3 of them drawn now" in done.stdout
    names = [record["file"] for record in read_lines(tmp_path / "images" / "manifest.jsonl")]
    assert names == ["lighthouse.png", "ring.png", "00003.png"]
