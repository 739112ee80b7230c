# SPDX-License-Identifier: Apache-2.0
"""Two processes with half of every layer's heads each keep, and generate, what one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from tensor_parallel_cases import HEADS, IMAGE, TEXT, generate_all, load_models, save_models  # noqa: E402

CASES = [*(f"text: {name}" for name in TEXT), *(f"image: {name}" for name in IMAGE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    path = tmp_path_factory.mktemp("models")
    save_models(path)
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return generate_all(folder, *load_models(folder))


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command, str(HERE / "tensor_parallel_runner.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_keep_and_say_what_one_does(
    case: str, alone: dict[str, Any], ranks: list[dict[str, Any]]
) -> None:
    whole, parts = alone[case], [rank[case] for rank in ranks]
    assert [part["tokens"] for part in parts] == [whole["tokens"]] * 2
    half = HEADS // 2
    for index, part in enumerate(parts):
        own = slice(index * half, (index + 1) * half)
        for kept, lengths, layer in zip(part["kept"], part["lengths"], whole["kept"], strict=True):
            assert kept == [row[own] for row in layer]
            assert lengths == [[len(head) for head in row[own]] for row in layer]
    seen = 41 if case.startswith("image") else 67  # tokens of the longest row
    assert max(len(head) for layer in whole["kept"] for row in layer for head in row) < seen


def test_each_process_holds_its_part_of_the_bytes(alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for case in CASES:
        held = [rank[case]["nbytes"] for rank in ranks]
        # What does not belong to a head (tokens seen, and the like) every process has.
        assert alone[case]["nbytes"] <= sum(held) < alone[case]["nbytes"] * 1.05
    assert sum(rank["text: bytes"]["nbytes"] for rank in ranks) < 60 * 1024 * 1.01


def test_what_cannot_work_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        messages = rank["refused"]
        assert "HeadKVCache(model, ...)" in messages["configuration"]
        assert "observed.heads" in messages["allocator"]
        assert "cannot be saved" in messages["save"]
        assert "3 KV heads cannot be divided among 2 processes" in messages["uneven"]
        assert messages["second"] == ""
