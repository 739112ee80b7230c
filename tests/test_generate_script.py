# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parent.parent / "scripts" / "generate_images.py"
PROMPTS = ("red circle top", "blue ring left on black", "green square bottom")


def _run(prompts: Path, output: Path, processes: int, *more: str) -> subprocess.CompletedProcess[str]:
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    # A free port, so that two runs of the tests do not meet.
    launcher += [] if processes == 1 else ["--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command = [sys.executable, *launcher, str(SCRIPT), str(prompts), "--output", str(output), "--cpu", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def _tokens(folder: Path) -> dict[str, bytes]:
    return {file.name: Image.open(file).tobytes() for file in sorted(folder.glob("*.png"))}


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n\n")
    for processes in (1, 2):
        result = _run(prompts, tmp_path / str(processes), processes, "--kv-compression", "none", "--seed", "4")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1])["prompts"] == 3
    one, two = _tokens(tmp_path / "1"), _tokens(tmp_path / "2")
    assert list(one) == [f"{number:05d}-seed4.png" for number in range(3)]
    assert one == two
    record = json.loads((tmp_path / "2" / "run.json").read_text())
    assert record["processes"] == 2
    assert [item["prompt"] for item in record["prompts"]] == list(PROMPTS)
    assert not list((tmp_path / "2").glob(".headkv-mm-*"))
