# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.pipelines import PIPELINE_REGISTRY

import headkv_mm.demo
from headkv_mm.pipelines.document_qa import LongDocumentQAPipeline
from headkv_mm.pipelines.registration import LONG_DOCUMENT_QA, TASK, LongDocumentQATask, TextToImageTask, register
from headkv_mm.pipelines.text_to_image import TextToImagePipeline

PROMPT = "red circle top on white"


def test_transformers_knows_the_task(tiny_folder: Path, pipe: TextToImagePipeline) -> None:
    ours = transformers.pipeline(TASK, model=str(tiny_folder), kv_compression="lines", kv_budget=0.5, device="cpu")
    assert isinstance(ours, TextToImagePipeline)
    out = ours(PROMPT, seed=0)
    assert out.report.method == "lines"
    assert torch.equal(ours(PROMPT, seed=0, kv_compression="none").tokens, pipe(PROMPT, seed=0).tokens)


def test_default_model_is_the_embedded_one(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headkv_mm.demo, "image_model_path", lambda: tiny_folder)
    ours = transformers.pipeline(TASK, kv_compression="headkv", kv_budget=0.5, device="cpu")
    assert ours.model.name_or_path == str(tiny_folder)


def test_a_missing_default_does_not_break_other_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise FileNotFoundError("the embedded text-to-image model is missing")

    monkeypatch.setattr(headkv_mm.demo, "image_model_path", missing)
    assert register()
    assert TASK in PIPELINE_REGISTRY.get_supported_tasks()
    with pytest.raises(FileNotFoundError, match="embedded"):
        transformers.pipeline(TASK)


def test_the_entry_is_a_complete_mapping(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headkv_mm.demo, "image_model_path", lambda: tiny_folder)
    entry = TextToImageTask()
    assert set(entry.copy()) == {"impl", "pt", "default", "type"}
    assert len(entry) == 4
    with pytest.raises(KeyError):
        entry["revision"]


def test_the_entry_for_documents(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headkv_mm.demo, "text_model_path", lambda: tiny_llama_folder)
    entry = PIPELINE_REGISTRY.supported_tasks[LONG_DOCUMENT_QA]
    assert isinstance(entry, LongDocumentQATask)
    assert entry.copy() == {
        "impl": LongDocumentQAPipeline,
        "pt": (transformers.AutoModelForCausalLM,),
        "default": {"model": (str(tiny_llama_folder), "main")},
        "type": "text",
    }
    monkeypatch.setitem(PIPELINE_REGISTRY.supported_tasks, LONG_DOCUMENT_QA, {"impl": object})
    assert not register()
    ours = headkv_mm.pipeline(LONG_DOCUMENT_QA, tiny_llama_folder, device="cpu")
    assert isinstance(ours, LongDocumentQAPipeline)


def test_saved_document_pipelines_load(tiny_llama_folder: Path, tmp_path: Path) -> None:
    ours = transformers.pipeline(LONG_DOCUMENT_QA, model=str(tiny_llama_folder), device="cpu")
    ours.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = transformers.pipeline(LONG_DOCUMENT_QA, model=str(tmp_path), device="cpu")
    question = {"text": "The code of the river is 7. " * 20, "questions": "what is the code?"}
    assert again(question, kv_budget=32).text == ours(question, kv_budget=32).text


def test_saved_pipelines_load_without_remote_code(pipe: TextToImagePipeline, tmp_path: Path, tiny_folder: Path) -> None:
    loaded = transformers.pipeline(TASK, model=str(tiny_folder), device="cpu")
    loaded.save_pretrained(tmp_path)
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    assert not list(tmp_path.glob("*.py"))
    again = transformers.pipeline(TASK, model=str(tmp_path), device="cpu")
    assert torch.equal(again(PROMPT, seed=0).tokens, pipe(PROMPT, seed=0).tokens)


def test_somebody_elses_task_stays(monkeypatch: pytest.MonkeyPatch, tiny_model: Any) -> None:
    theirs = {"impl": object, "pt": (), "default": {}, "type": "multimodal"}
    monkeypatch.setitem(PIPELINE_REGISTRY.supported_tasks, TASK, theirs)
    assert not register()
    assert PIPELINE_REGISTRY.supported_tasks[TASK] is theirs
    assert isinstance(headkv_mm.pipeline(TASK, tiny_model, device="cpu"), TextToImagePipeline)


def test_a_missing_entry_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PIPELINE_REGISTRY.supported_tasks, TASK)
    assert register()
    assert PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] is TextToImagePipeline
