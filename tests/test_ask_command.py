# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from headkv_mm import cli
from headkv_mm.commands import ask
from headkv_mm.commands.ask_output import Given, notes
from headkv_mm.demo.documents.examples import example_documents, make_example

QUESTION = "What is the code of the warm river?"
TEXT = "The code of the warm river is 2998. A painter moved the rug near the wall. " * 12


@pytest.fixture(autouse=True)
def _no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the kernels that a test runs are compiled."""
    monkeypatch.setattr(ask, "compile_cpu_kernels", lambda dtypes: 0.0)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder with random weights and the embedded model's tokenizer."""
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
        max_position_embeddings=2048,
        initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text(TEXT)
    return path


def _ask(small_model: str, *arguments: object) -> int:
    length = () if "--max-new-tokens" in arguments else ("--max-new-tokens", "6")
    device = () if "--device" in arguments else ("--device", "cpu")
    return cli.main(["ask", *map(str, arguments), "--model", small_model, *device, *length])


def _json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    return record


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("headkv-mm: error: ")
    return lines[0]


def test_answers_are_those_of_the_pipeline(
    small_model: str, document: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import headkv_mm

    (tmp_path / "questions.txt").write_text("\nWhat is the age of the low forge?\n\n")
    arguments = ["--question", QUESTION, "--questions-file", tmp_path / "questions.txt", "--kv-budget", "1/2"]
    assert _ask(small_model, document, *arguments, "--kv-compression", "streaming", "--json") == 0
    record = _json(capsys)
    qa = headkv_mm.pipeline("long-document-question-answering", small_model, device="cpu")
    doc = qa.read(document, kv_compression="streaming", kv_budget=0.5)
    questions = [QUESTION, "What is the age of the low forge?"]
    answers = doc.ask(questions, max_new_tokens=6)
    assert [item["text"] for item in record["answers"]] == [answer.text for answer in answers]
    assert [item["question"] for item in record["answers"]] == questions
    assert [item["number"] for item in record["answers"]] == [1, 2]
    assert record["answers"][0]["nbytes"] == answers[0].nbytes
    (report,) = record["documents"]
    assert (report["method"], report["budget"], report["cache"]) == ("streaming", 0.5, "compressed")
    assert report["kept"] == doc.report.kept
    assert record["versions"]["pypdf"]
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "questions.txt"], "nothing is written unless asked for"


def test_the_example_with_everything(small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    arguments = ("--compare", "--maps", "--output", tmp_path / "out", "--save", tmp_path / "a.kv")
    assert _ask(small_model, *arguments) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "answers.json").read_text())
    questions = [question.text for question in make_example(ask.EXAMPLE_DOCUMENT).questions]
    for question in questions:
        assert question in out
    assert [(item["cache"], item["question"]) for item in record["answers"]] == [
        (cache, question) for question in questions for cache in ("full", "compressed")
    ]
    assert all(0 <= item["score"] <= 1 for item in record["answers"])
    full, small = record["answers"][:2]
    assert full["nbytes"] == pytest.approx(full["nbytes_full"], rel=1e-3)  # some bytes of bookkeeping
    assert small["nbytes"] < small["nbytes_full"] / 2
    assert re.search(rf"^1  full cache .* {full['document_tokens']} of {full['document_tokens']} ", out, re.MULTILINE)
    assert re.search(rf"^1  pointed 1/4 .*{small['ratio']:.1%}", out, re.MULTILINE)
    assert record["pictures"] == ["map.png"]
    assert Image.open(tmp_path / "out" / "map.png").width > 500
    assert out.splitlines()[-3:] == [
        str(path) for path in (tmp_path / "out" / "map.png", tmp_path / "out" / "answers.json", tmp_path / "a.kv")
    ]


def test_saved_documents(small_model: str, document: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "a.kv"
    assert _ask(small_model, document, "--save", saved, "--kv-budget", "1/2") == 0, "reading alone is fine"
    capsys.readouterr()
    assert _ask(small_model, document, "--question", QUESTION, "--kv-budget", "1/2", "--json") == 0
    wanted = _json(capsys)["answers"][0]
    assert _ask(small_model, saved, "--question", QUESTION, "--json") == 0
    found = _json(capsys)
    assert found["answers"][0]["text"] == wanted["text"]
    assert found["answers"][0]["nbytes"] == wanted["nbytes"]
    assert found["documents"][0]["names"] == [str(document)]
    saved.write_bytes(saved.read_bytes()[:-10])
    assert _ask(small_model, saved, "--question", QUESTION) == 2
    assert "a.kv" in _error(capsys)


def test_query_aware_is_said(small_model: str, document: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = (document, "--question", QUESTION, "--question", "What is the age of the low forge?", "--query-aware")
    assert _ask(small_model, *arguments, "--maps", "--output", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert out.count("compressed knowing the question") == 2
    assert "compressed knowing each question" in out
    record = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert all(item["query_aware"] for item in (*record["answers"], *record["documents"]))
    assert [item["question"] for item in record["documents"]] == [item["question"] for item in record["answers"]]
    assert record["pictures"] == ["map-question01.png", "map-question02.png"]


def test_pdf_and_several_documents(small_model: str, document: Path, tmp_path: Path, capsys: Any) -> None:
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = PdfWriter()
    page = writer.add_blank_page(300, 300)
    font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    fonts = DictionaryObject({NameObject(key): NameObject(value) for key, value in font.items()})
    page[NameObject("/Resources")] = DictionaryObject(
        {NameObject("/Font"): DictionaryObject({NameObject("/F1"): fonts})}
    )
    content = DecodedStreamObject()
    content.set_data(b"BT /F1 12 Tf 10 100 Td (The age of the quantum forge is 0407.) Tj ET")
    page[NameObject("/Contents")] = content
    writer.write(tmp_path / "a.pdf")
    arguments = (document, tmp_path / "a.pdf", "--question", "What is the age of the quantum forge?", "--json")
    assert _ask(small_model, *arguments) == 0
    record = _json(capsys)
    assert record["documents"][0]["names"] == [str(document), str(tmp_path / "a.pdf")]
    words = record["documents"][0]["words"]
    assert record["documents"][0]["known_words"] < words
    assert f"of {words} words of the document" in " ".join(record["notes"])


def test_notes_are_honest(small_model: str) -> None:
    import headkv_mm

    qa = headkv_mm.pipeline("long-document-question-answering", small_model, device="cpu")

    def said(text: str, question: str, *, embedded: bool) -> str:
        return " ".join(notes(qa.read(text=text), Given([], [question]), embedded=embedded))

    assert said(TEXT, QUESTION, embedded=False) == ""
    assert "knows 192 of 192 words of the document and 8 of 8" in said(TEXT, QUESTION, embedded=True)
    strange = said("Quarterly revenue exceeded analysts' expectations.", QUESTION, embedded=True)
    assert "knows 0 of 5 words" in strange and "do not trust the answers" in strange
    assert "do not trust its answer" in said(TEXT, "What is the revenue?", embedded=False)


def test_answers_can_be_drawn(small_model: str, document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def texts(*more: str) -> list[str]:
        arguments = (document, "--question", QUESTION, "--question", QUESTION, "--json", *more)
        assert _ask(small_model, *arguments) == 0
        return [item["text"] for item in _json(capsys)["answers"]]

    first = texts("--temperature", "2", "--seed", "1")
    assert first == texts("--temperature", "2", "--seed", "1") != texts("--temperature", "2", "--seed", "2")
    greedy = texts()
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-compression", "snapvk"], "unknown method 'snapvk'"),
        (["--kv-compression", "none", "--compare"], "--compare needs a compression"),
        (["--kv-option", "no_such=1"], "no option 'no_such'"),
        (["--kv-budget", "2.5"], "2.5"),
        (["--max-new-tokens", "0"], "at least 1"),
        (["--max-new-tokens", "2000"], "model has 2048 positions"),
        (["--question", " "], "question is empty"),
        (["--questions-file", "/no/such/file"], "No such file or directory: /no/such/file"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--save", "a.txt"], "is called .kv"),
        (["--save", "a.kv", "--query-aware", "--question", "Why?"], "needs one --question"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--kv-budget", "1KiB"], "budget '1KiB' leaves -?[0-9]+ entries per KV head"),
        (["other.kv"], "other.kv is a compressed document and stands alone"),
        (["none.txt"], "No such file or directory: none.txt"),
    ],
    ids=str,
)
def test_bad_arguments(
    small_model: str,
    document: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert _ask(small_model, document, *arguments, "--question", QUESTION, "--output", tmp_path / "out") == 2
    assert re.search(message, _error(capsys))
    assert sorted(os.listdir(tmp_path)) == ["notes.txt"], "an error leaves nothing behind"


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "is empty"), (b"\0\1\2", "is a binary file"), (b"%PDF-1.4 cut", "is damaged or no complete PDF file")],
)
def test_bad_documents(small_model: str, tmp_path: Path, capsys: Any, data: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    assert _ask(small_model, path, "--question", QUESTION, "--maps", "--output", tmp_path / "out") == 2
    assert re.search(f"{path} {message}", _error(capsys))
    assert os.listdir(tmp_path) == ["a.txt"]


def test_nothing_to_ask(small_model: str, document: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _ask(small_model, document) == 2
    assert "there is no question: add --question" in _error(capsys)
    (tmp_path / "a.kv").write_bytes(b"0")
    assert _ask(small_model, tmp_path / "a.kv", "--question", QUESTION, "--kv-budget", "1/2") == 2
    assert "compressed already: leave --kv-" in _error(capsys)


def test_an_interruption(
    small_model: str, document: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ask, "write_pictures", interrupt)
    arguments = ("--question", QUESTION, "--maps", "--output", tmp_path / "out", "--save", tmp_path / "a.kv")
    assert _ask(small_model, document, *arguments) == 130
    assert "interrupted, nothing was written" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_ctrl_c_in_a_real_process(interruptible_command: list[str], small_model: str, tmp_path: Path) -> None:
    example = example_documents()[0]
    command = [*interruptible_command, "ask", str(example.document), "--model", small_model]
    process = subprocess.Popen(
        [*command, "--question", QUESTION, "--max-new-tokens", "1400", "--kv-compression", "none"]
        + ["--question", QUESTION] * 50
        + ["--output", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        time.sleep(4)  # imports are over by then, also on a busy machine
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.strip() == "headkv-mm: interrupted, nothing was written"
    assert not (tmp_path / "out").exists()
