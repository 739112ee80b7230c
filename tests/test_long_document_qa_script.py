# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "long_document_qa.py"
QUESTIONS = ("What is the code of the warm river?", "What is the age of the low forge?")
MEASURED = ("seconds_to_first_token", "tokens_per_second")


@pytest.fixture
def model(tmp_path: Path) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from headkv_mm.demo.text_tokenizer import build_text_tokenizer

    tokenizer = build_text_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def _run(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    # A free port, so that two runs of the tests do not meet.
    launcher += [] if processes == 1 else ["--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command = [sys.executable, *launcher, str(SCRIPT), *map(str, arguments), "--cpu", "--max-new-tokens", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def _records(path: Path) -> list[dict[str, Any]]:
    """The lines of a file without what a clock measured."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


@pytest.mark.slow
def test_many_documents(model: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.txt" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_text(f"The code of the warm river is 299{number}. A painter moved the rug. " * 9)
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS) + "\n\n")
    arguments = [*paths, "--questions-file", tmp_path / "questions.txt", "--model", model, "--output"]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for processes, output in ((1, one), (2, two)):
        result = _run(processes, *arguments, output)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1])["answers"] == 6
    assert _records(one) == _records(two)
    assert [(item["document"], item["question"]) for item in _records(one)] == [
        (str(path), question) for path in paths for question in QUESTIONS
    ]
    assert not list(tmp_path.glob("*.part-*"))

    # A run that was cut: four answers in the file of a process, the last line not complete.
    whole = two.read_text().splitlines(keepends=True)
    two.unlink()
    (tmp_path / "two.jsonl.part-1").write_text("".join(whole[:3]) + whole[3][:40])
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.4 cut")
    result = _run(1, tmp_path / "bad.pdf", *arguments, two)
    assert result.returncode == 1
    assert "bad.pdf is damaged" in result.stderr.splitlines()[-1]
    assert _records(two) == _records(one)
    assert [line for line in whole[:3] if line not in two.read_text()] == [], "answered questions are not asked again"

    result = _run(1, *arguments, two, "--kv-budget", "1/2")
    assert result.returncode != 0
    assert "holds answers with other settings" in result.stderr


def test_help_and_missing_questions() -> None:
    for arguments, status in ((("--help",), 0), (("a.txt", "--output", "a.jsonl"), 2)):
        result = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)
        assert result.returncode == status
    assert "there is no question" in result.stderr
