# SPDX-License-Identifier: Apache-2.0
"""What trains the embedded language model: tokenizer, rows, masks, schedule, export, script."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from headkv_mm.demo import text_schedule
from headkv_mm.demo.checkpoint import load_checkpoint, save_checkpoint
from headkv_mm.demo.documents import TASKS, is_held_out, make_document, prompt_text
from headkv_mm.demo.text_evaluation import evaluate_text_model, exact_share, unseen_documents, would_answer
from headkv_mm.demo.text_export import export_text_model, write_scores
from headkv_mm.demo.text_model import LOOK_BACK_OFFSETS, build_untrained_text_model
from headkv_mm.demo.text_rows import KINDS, VALUE_WEIGHT, document_row, repeats_row, token_ids
from headkv_mm.demo.text_schedule import FULL_MIX, MIXED_LENGTHS, STAGES, learning_rate_factor, next_batch
from headkv_mm.demo.text_tokenizer import EOS, PAD, TOKENS, build_text_tokenizer
from headkv_mm.demo.text_training import batch_losses, forgetful_mask, positions_with_jumps, text_batch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_demo_text.py"
RESULTS = {
    "documents": 7,
    "decoding": "greedy",
    "cache": "full",
    "results": [{"length": 512, "seed": 1, "exact": 0.5, "tasks": {"single": 0.25, "list": 0.75}}],
}
TRAINING = {
    "step": 3,
    "tokens": 2_000_000,
    "seconds": 60.0,
    "stage": 2,
    "forgetful_tokens": 5,
    "seed": 0,
    "threads": 1,
    "note": "It rained.",
}


def test_the_tokenizer_reads_what_training_reads() -> None:
    tokenizer = build_text_tokenizer()
    for task in TASKS:
        document = make_document(task, random.Random(1), 400, lambda text: len(tokenizer(text)["input_ids"]))
        text = prompt_text(document)
        ids = tokenizer(text)["input_ids"]
        assert ids == [tokenizer.bos_token_id, *token_ids(text)]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == re.sub(r"\s+", " ", text.lower())


def test_the_tokenizer_and_other_texts() -> None:
    tokenizer = build_text_tokenizer()
    ids = tokenizer("The CODE, of 2998: zebra?")["input_ids"]
    assert tokenizer.decode(ids) == "<bos> the code, of 2998: <unk>?"
    batch = tokenizer(["the code", "the"], padding=True)
    assert batch["input_ids"][1][0] == tokenizer.pad_token_id
    assert batch["attention_mask"][1] == [0, 1, 1]
    assert len(TOKENS) == len(set(TOKENS)) == len(tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [128, 512])
def test_rows_of_documents(kind: str, length: int) -> None:
    for seed in range(12):
        row = document_row(random.Random(seed), length, {kind: 1.0})
        assert row == document_row(random.Random(seed), length, {kind: 1.0})
        assert {len(part) for part in (row.inputs, row.targets, row.weights, row.spare)} == {length}
        tokens = [TOKENS[item] for item in row.inputs]
        assert tokens[row.asking] == "question"
        assert "question" not in tokens[: row.asking]
        assert not any(row.spare[row.asking :])
        end, pad = TOKENS.index(EOS), TOKENS.index(PAD)
        for place, (target, following) in enumerate(zip(row.targets, [*row.inputs[1:], pad], strict=True)):
            if target == end:
                assert row.weights[place] == VALUE_WEIGHT
                assert tokens[place] == "."
            elif row.weights[place]:
                assert target == following
        text = " ".join(tokens)
        names = re.findall(r"of the (\w+ \w+)(?: on \w+)? is", text)
        assert not any(is_held_out(name) for name in names)
        spared = " ".join(token for token, spare in zip(tokens, row.spare, strict=True) if not spare)
        replies = re.findall(r"answer : (.*?\.)(?= question| <pad>|$)", text)
        assert replies
        for reply in replies:  # what an answer says stands among the needed tokens of the document too
            assert all(spared.count(sentence.strip()) > 1 for sentence in reply.split(".") if sentence.strip())


def test_a_row_that_is_too_short() -> None:
    with pytest.raises(ValueError, match="at least 128 tokens"):
        document_row(random.Random(0), 100, {"number": 1.0})


def test_rows_of_repeats() -> None:
    row = repeats_row(random.Random(0), 80)
    assert row.targets[:-1] == row.inputs[1:]
    text = " ".join(map(str, row.inputs))
    for place, weight in enumerate(row.weights[:-1]):
        if weight:  # what is asked for has been seen before, after the same token
            assert text.count(f" {row.inputs[place]} {row.targets[place]}") > 1
    assert sum(row.weights) > 20


def test_positions_with_jumps() -> None:
    for seed in range(20):
        positions = positions_with_jumps(random.Random(seed), 100, 3)
        steps = positions[0].diff()
        assert positions.shape == (1, 100)
        assert positions[0, 0] == 0
        assert steps.min() >= 1
        assert (steps > 1).sum() <= 3
        assert positions.max() < 4096
    assert torch.equal(positions_with_jumps(random.Random(0), 5, 0), torch.arange(5)[None])


def test_the_forgetful_mask_spares_evidence_and_prefill() -> None:
    batch = text_batch(random.Random(0), 256, 8, FULL_MIX)
    mask = forgetful_mask(batch, 8, 4, torch.Generator().manual_seed(0))
    causal = torch.ones(256, 256, dtype=torch.bool).tril()
    assert mask.shape == (8, 8, 256, 256)
    assert not (mask & ~causal).any()
    lost = ~mask & causal
    assert lost.any()
    assert torch.equal(mask[:, 0::2], mask[:, 1::2])  # query heads of a KV head have lost the same
    assert not torch.equal(mask[:, 0], mask[:, 2])
    for row in range(8):
        asking = int(batch.asking[row])
        assert not lost[row, :, :asking].any()
        assert not (lost[row] & ~batch.spare[row]).any()
        assert not lost[row, :, :, asking - 16 :].any()
        assert torch.equal(lost[row, :, asking], lost[row, :, -1])  # what is lost stays lost


def test_losses_agree_with_the_stock_loss() -> None:
    model = build_untrained_text_model(0)
    batch = text_batch(random.Random(0), 96, 2, None)
    with torch.no_grad():
        loss, values = batch_losses(model, batch)
        labels = torch.where(batch.weights > 0, batch.targets, -100)
        labels = torch.cat((torch.full((2, 1), -100), labels[:, :-1]), dim=1)
        padded = torch.where(batch.weights[:, -1:] > 0, batch.targets[:, -1:], -100)
        inputs = torch.cat((batch.inputs, torch.zeros(2, 1, dtype=torch.long)), dim=1)
        expected = model(inputs, labels=torch.cat((labels, padded), dim=1), use_cache=False).loss
    torch.testing.assert_close(loss, expected)
    assert values == pytest.approx(float(loss))
    whole = torch.ones(2, 8, 96, 96, dtype=torch.bool).tril()
    torch.testing.assert_close(batch_losses(model, batch, whole)[0], loss)


def test_the_first_heads_look_back() -> None:
    model = build_untrained_text_model(3)
    model.set_attn_implementation("eager")
    ids = torch.randint(4, len(TOKENS), (4, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention = model(ids, output_attentions=True).attentions[0]  # [B, H, T, T]
    for head, offset in enumerate(LOOK_BACK_OFFSETS):
        mean = torch.stack([attention[:, head].diagonal(-back, 1, 2)[:, 10:].mean() for back in range(8)])
        assert mean.argmax() == offset
        assert mean[offset] > 0.6


def test_batches_follow_the_schedule() -> None:
    for stage in range(len(STAGES) + 1):
        first, second = next_batch(0, 11, stage), next_batch(0, 11, stage)
        assert torch.equal(first.inputs, second.inputs)
        lengths = [STAGES[stage].length] if stage < len(STAGES) else list(MIXED_LENGTHS)
        assert first.inputs.shape[1] in lengths
        assert not torch.equal(first.inputs[0, :80], next_batch(0, 12, stage).inputs[0, :80])


def test_learning_rate() -> None:
    assert learning_rate_factor(0, 0, 1000) == pytest.approx(1 / 40)
    assert learning_rate_factor(100, 249, 1000) == 1.0
    assert learning_rate_factor(100, 625, 1000) == pytest.approx(0.25)
    assert learning_rate_factor(100, 1000, 1000) == pytest.approx(0.02)
    assert learning_rate_factor(100, 1000, 1000, 400) == pytest.approx(0.1)
    assert learning_rate_factor(100, 1200, 1000, 400) == pytest.approx(0.05)


def test_a_resumed_run_with_tied_weights_continues_exactly(tmp_path: Path) -> None:
    def steps(model: LlamaForCausalLM, adam: torch.optim.Optimizer, first: int) -> None:
        for step in range(first, first + 2):
            loss, _ = batch_losses(model, next_batch(0, step, 1))
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            adam.zero_grad()

    straight = build_untrained_text_model(0)
    adam: torch.optim.Optimizer = torch.optim.AdamW(straight.parameters())
    steps(straight, adam, 0)
    save_checkpoint(tmp_path / "c.safetensors", straight, {"adam": adam}, {"step": 2})
    steps(straight, adam, 2)
    resumed = build_untrained_text_model(1)
    adam = torch.optim.AdamW(resumed.parameters())
    assert load_checkpoint(tmp_path / "c.safetensors", resumed, {"adam": adam}) == {"step": 2}
    steps(resumed, adam, 2)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_export(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = build_untrained_text_model(1)
    export_text_model(model, folder, RESULTS, TRAINING)
    (folder / "compiled_tables.json").write_text("{}")  # what was measured on the old weights
    export_text_model(model, folder, RESULTS, TRAINING)  # replaces the first
    assert not (folder / "compiled_tables.json").exists()
    assert [item.name for item in tmp_path.iterdir()] == ["model"]
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert {value.dtype for value in weights.values()} == {torch.float16}
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.dtype == torch.float32
    assert not loaded.generation_config.do_sample
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.half().float())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.padding_side == "left"
    assert tokenizer("the code 12")["input_ids"] == build_text_tokenizer()("the code 12")["input_ids"]
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| 512 | 50.0 % |" in card
    assert "| list | 75.0 % |" in card
    assert "\nIt rained.\n" in card
    assert json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["training"] == TRAINING
    write_scores(folder, {**RESULTS, "documents": 9}, TRAINING)
    assert json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["documents"] == 9


def test_evaluation_of_an_untrained_model_scores_nothing() -> None:
    model = build_untrained_text_model(0).eval()
    result = evaluate_text_model(model, documents=7, seeds=(1,), lengths=(128,))
    assert result["results"][0]["exact"] == 0
    assert len(result["results"][0]["tasks"]) == 7
    assert would_answer(model, unseen_documents("single", 128, 2, 0)) == 0


def test_exact_share_wants_all_turns() -> None:
    documents = unseen_documents("two-turn", 128, 2, 0)
    right = [[question.reply for question in document.questions] for document in documents]
    assert exact_share(documents, right) == 1
    assert exact_share(documents, [right[0], [right[1][0], "no"]]) == 0.5


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_text", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_script_trains_forgets_resumes_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, folder = _script(), tmp_path / "model"
    for module in (script, text_schedule):
        monkeypatch.setattr(module, "STAGES", ())  # mixed lengths from the beginning
    monkeypatch.setattr(script, "evaluate_text_model", lambda model, documents, report: RESULTS)
    command = ["train", "--output", str(folder), "--evaluation-documents", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--tokens", "4000", "--forgetful-tokens", "4000"])
    assert script.main() == 0
    first = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    monkeypatch.setattr(sys, "argv", [*command, "--tokens", "4000", "--forgetful-tokens", "8000", "--resume"])
    assert script.main() == 0
    assert not torch.equal(load_file(folder / "model.safetensors")["model.embed_tokens.weight"], first)
    monkeypatch.setattr(sys, "argv", [*command, "--evaluate-only"])
    assert script.main() == 0
    assert json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["training"]["tokens"] >= 12000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--forgetful-tokens", "-1"], "must not be negative"),
        (["--resume"], "there is no checkpoint"),
        (["--evaluate-only"], "there is no model"),
    ],
)
def test_bad_arguments_of_the_script(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--output", str(tmp_path / "model"), *arguments])
    with pytest.raises(SystemExit):
        _script().parse_arguments()
    assert message in capsys.readouterr().err


def test_help() -> None:
    result = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "--forgetful-tokens" in result.stdout
