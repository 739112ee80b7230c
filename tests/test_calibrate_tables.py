# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm calibrate tables`: Q-learning by hand, roll-outs by hand, breaks, files, and bad input."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from headkv_mm import HeadKVCache, cli, demo
from headkv_mm.calibration.compiling import GATE_ACTIONS, WEIGHT_ACTIONS, Bins, compiled, quantile_edges
from headkv_mm.calibration.conservative_q import Fitted, Trial, fit, gradient
from headkv_mm.calibration.continued_texts import continued_texts
from headkv_mm.calibration.rollouts import ReadText, full_run
from headkv_mm.calibration.tables import TablesCalibration, calibrate_tables
from headkv_mm.compiled_tables import compiled_tables_for, load_compiled_tables
from headkv_mm.demo.documents import is_held_out
from headkv_mm.demo.text_tokenizer import build_text_tokenizer

WORDS = build_text_tokenizer()
FEW = TablesCalibration(
    texts=3,
    validation=1,
    length=260,
    budgets=(0.5, 0.25),
    trials=4,
    entropy_bins=2,
    perplexity_bins=2,
    least=1,
)
TEXT = "the code of the warm river is 2 9 9 8 . it was rainy on monday , and the clerk stood in the yard . " * 60


@pytest.fixture(autouse=True)
def _plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling the kernels would take longer than all that runs here."""
    monkeypatch.setenv("HEADKV_MM_KERNELS", "reference")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        max_position_embeddings=1024,
        bos_token_id=WORDS.bos_token_id,
        eos_token_id=WORDS.eos_token_id,
        pad_token_id=WORDS.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


def test_the_gradient_is_that_of_the_loss_by_hand() -> None:
    """Three trials of one state: action 0 with rewards 1 and 2, action 1 with -1; action 2 never."""
    q = [0.4, -0.3, 0.7]
    total = math.exp(0.4) + math.exp(-0.3)  # what was never tried is no choice
    expected = [
        0.75 * (math.exp(0.4) / total - 2 / 3) + ((0.4 - 1) + (0.4 - 2)) / 3,
        0.75 * (math.exp(-0.3) / total - 1 / 3) + (-0.3 + 1) / 3,
        0.0,
    ]
    counts, sums = torch.tensor([[2, 1, 0]]), torch.tensor([[3.0, -1.0, 0.0]], dtype=torch.float64)
    found = gradient(torch.tensor([q], dtype=torch.float64), counts, sums, 0.75)
    assert found[0].tolist() == pytest.approx(expected)


@given(
    trials=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.floats(-3, 3)),
        min_size=1,
        max_size=30,
    ),
    conservatism=st.sampled_from([0.0, 0.75, 2.0]),
)
@settings(max_examples=25, deadline=None)
def test_what_is_learned_is_the_minimum(trials: list[tuple[int, int, float]], conservatism: float) -> None:
    found = fit([Trial([s], [a], r) for s, a, r in trials], 3, 4, conservatism)
    backwards = fit([Trial([s], [a], r) for s, a, r in trials[::-1]], 3, 4, conservatism)
    assert (found.values - backwards.values).abs().max() < 1e-6
    assert found.counts.sum() == len(trials)

    def loss(state: int, q: list[float]) -> float:
        own = [(action, reward) for at, action, reward in trials if at == state]
        spread = math.log(sum(math.exp(q[action]) for action in {action for action, _ in own}))
        return sum(conservatism * (spread - q[a]) + (q[a] - r) ** 2 / 2 for a, r in own) / len(own)

    for state in {one[0] for one in trials}:
        q = found.values[state].tolist()
        for action in {a for s, a, _ in trials if s == state}:
            for step in (-1e-3, 1e-3):
                moved = [value + step * (place == action) for place, value in enumerate(q)]
                assert loss(state, q) <= loss(state, moved) + 1e-9
            if conservatism == 0:
                rewards = [r for s, a, r in trials if (s, a) == (state, action)]
                assert q[action] == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)


def test_what_has_no_support_is_the_identity() -> None:
    values = torch.tensor([[0.1, 0.2, 9.0], [0.1, 0.2, 9.0], [0.5, 0.4, 0.3], [0.0, 0.0, 0.0]], dtype=torch.float64)
    counts = torch.tensor([[5, 5, 4], [4, 5, 5], [5, 5, 5], [0, 0, 0]])
    # The third action of the first state and the identity of the second were tried too seldom.
    assert Fitted(values, counts).choices(0, 5).tolist() == [1, 0, 0, 0]
    assert Fitted(values, counts).choices(0, 4).tolist() == [2, 2, 0, 0]


def test_edges_divide_evenly() -> None:
    assert quantile_edges([4.0, 1.0, 3.0, 2.0, 5.0], 2) == (3.0,)
    assert quantile_edges([1.0, 2.0], 1) == ()
    edges = quantile_edges([float(number) for number in range(1000)], 4)
    assert edges == pytest.approx((249.75, 499.5, 749.25))


def record(entropies: list[float], perplexity: float, trials: list[dict[str, Any]]) -> dict[str, Any]:
    budgets = [{"identity": 1.0, "trials": trials}]
    return {"full": 0.5, "perplexity": perplexity, "entropies": entropies, "budgets": budgets}


def test_tables_follow_the_rewards() -> None:
    """Weight 1.5 of the second head helps and 0.8 does harm; the threshold 1.0 helps the first layer if it is even."""
    records = []
    for number in range(12):
        even = number % 2 == 0
        trials: list[dict[str, Any]] = []
        for action in range(len(WEIGHT_ACTIONS)):
            loss = 1.0 - 0.1 * WEIGHT_ACTIONS[action]
            trials.append({"weights": [[1, action], [1, 1]], "loss": loss, "held": 1.0})
        for action in range(len(GATE_ACTIONS)):
            loss = 1.0 - (0.1 if even else -0.1) * GATE_ACTIONS[action]
            trials.append({"gate": [action, 0], "loss": loss, "held": 0.9})
        records.append(record([0.8 if even else 0.3, 0.6], 2.0 + number, trials))
    found = compiled(records, (0.25,), Bins(2, 1), least=4, price=0.0)
    assert found.weights == ((1.0, 1.5), (1.0, 1.0))
    assert found.gate.entropy_edges == (0.6,) and found.gate.perplexity_edges == ()
    first, second = found.gate.gate
    assert first == ((0.0, 0.0), (1.0, 1.0)), "the bin of uneven attention, then the other"
    assert second == ((0.0, 0.0), (0.0, 0.0)), "never tried"
    assert found.weight_support == ((48, 48), (48, 48))
    assert found.gate_support == (((36, 36), (36, 36)), ((0, 0), (72, 72)))
    assert [line.get("text") for line in found.log] == [*range(12), None, None]
    assert found.log[-1]["changed"] == 2 and found.log[-2]["changed"] == 1
    # What a threshold saves can be worth something by itself.
    dear = [
        record(
            one["entropies"],
            one["perplexity"],
            [
                {**trial, "loss": 1.0, "held": 1.0 - GATE_ACTIONS[trial["gate"][0]] / 2} if "gate" in trial else trial
                for trial in one["budgets"][0]["trials"]
            ],
        )
        for one in records
    ]
    assert compiled(dear, (0.25,), Bins(2, 1), least=4, price=0.0).gate.gate[0] == ((0.0, 0.0), (0.0, 0.0))
    assert compiled(dear, (0.25,), Bins(2, 1), least=4, price=0.5).gate.gate[0] == ((1.0, 1.0), (1.0, 1.0))


@torch.no_grad()
def test_a_roll_out_is_what_a_cache_would_do(model: Any) -> None:
    (text,) = continued_texts(WORDS, texts=1, length=260, following=0, seed=0, text=None)
    weights, gate = ((1.0, 1.5), (0.8, 1.25)), (((2.0, 2.0),), ((0.0, 0.0),))
    ids = [torch.tensor([part]) for part in (text.read, text.following)]
    implementation = model.config._attn_implementation
    read = ReadText(model, text, 0.5, 32)
    outcome = read.outcome(weights, (2.0, 0.0))
    identity, entropies = read.identity()
    again = read.outcome(weights, (2.0, 0.0))
    assert again == outcome, "what is read stays whole"
    for options, found in (({"head_weights": weights, "gate": gate}, outcome), ({"tables": "identity"}, identity)):
        cache = HeadKVCache(model, "compilerkv", budget=0.5, **options)
        model(ids[0], past_key_values=cache)
        assert found.held == sum(len(head) for layer in range(2) for head in cache.kept_positions(layer)[0])
        logits = model(ids[1], past_key_values=cache).logits[0]
        losses = cross_entropy(logits[:-1], ids[1][0, 1:], reduction="none")
        answers = [loss for loss, counts in zip(losses.tolist(), text.counted[1:], strict=True) if counts]
        assert found.loss == pytest.approx(sum(answers) / len(answers), rel=1e-4)
    assert outcome.held < identity.held and outcome.loss != identity.loss
    assert len(entropies) == 2 and all(0 < entropy < 1 for entropy in entropies)
    model.set_attn_implementation("eager")
    whole = torch.cat(ids, 1)
    output = model(whole, output_attentions=True)
    model.config._attn_implementation = implementation
    losses = cross_entropy(output.logits[0, :-1], whole[0, 1:], reduction="none")
    answers = [loss for loss, counts in zip(losses[len(text.read) - 1 :].tolist(), text.counted) if counts]
    loss, perplexity = full_run(model, text, 32)
    assert loss == pytest.approx(sum(answers) / len(answers), rel=1e-4)
    last = losses[len(text.read) - 33 : len(text.read) - 1]
    assert perplexity == pytest.approx(math.exp(float(last.mean())), rel=1e-4)
    for layer, maps in enumerate(output.attentions):
        size = len(text.read)
        share = maps[0, :, size - 32 : size, :size].double().mean((0, 1))
        assert entropies[layer] == pytest.approx(float(-(share * share.log()).sum()) / math.log(size), rel=1e-3)


def test_texts_are_those_of_no_evaluation() -> None:
    texts = continued_texts(WORDS, texts=3, length=300, following=0, seed=0, text=None)
    for one in texts:
        names = re.findall("of the ([a-z]+ [a-z]+) is", WORDS.decode(one.read))
        assert len(names) > 3 and not any(map(is_held_out, names))
        assert len(one.following) == len(one.counted) and not one.counted[0] and any(one.counted)
        answers = WORDS.decode([token for token, counts in zip(one.following, one.counted) if counts])
        assert "question" not in answers and " is " in answers
    cut = continued_texts(WORDS, texts=2, length=50, following=10, seed=0, text=TEXT)
    assert [(len(one.read), len(one.following), sum(one.counted)) for one in cut] == [(40, 10, 9)] * 2


def test_a_broken_off_compilation_goes_on(model: Any, tmp_path: Path) -> None:
    partial, seen = tmp_path / "partial", []
    before = model.config._attn_implementation

    def break_off(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_tables(model, WORDS, FEW, partial=partial, on_text=break_off)
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match=r"begun with other settings \(length 260\)"):
        calibrate_tables(model, WORDS, replace(FEW, length=270), partial=partial)
    whole = calibrate_tables(model, WORDS, FEW)
    assert calibrate_tables(model, WORDS, FEW, partial=partial, on_text=seen.append) == whole
    assert seen == [2, 3, 4]
    assert not partial.exists()
    assert (whole.layers, whole.kv_heads, whole.texts) == (2, 2, 3)
    assert [row["budget"] for row in whole.validation] == [0.5, 0.25]
    assert all(0 < row["held"] <= 1 for row in whole.validation)
    assert sum(count for row in whole.head_support for count in row) == 4 * 3 * 2 * 2
    HeadKVCache(
        model,
        "compilerkv",
        head_weights=whole.head_weights,
        gate=whole.gate,
        entropy_edges=whole.entropy_edges,
        perplexity_edges=whole.perplexity_edges,
    )


def test_what_cannot_be_compiled_is_refused(model: Any) -> None:
    for change, message in (
        ({"texts": 0}, "texts must be at least 1"),
        ({"trials": 1}, "trials must be at least 2"),
        ({"budgets": (1.0,)}, "budgets must be shares between 0 and 1"),
        ({"budgets": (64,)}, "budgets must be shares between 0 and 1"),
        ({"price": -1.0}, "price must not be negative"),
        ({"length": 70}, "use a length of at least 80"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(FEW, **change)
    with pytest.raises(ValueError, match="made for 1024 positions, and the texts have 2000"):
        calibrate_tables(model, WORDS, replace(FEW, length=2000))
    with pytest.raises(ValueError, match=r"the text has \d+ tokens, and 4 texts of 260 need 1040"):
        calibrate_tables(model, WORDS, FEW, text=TEXT[:2000])


def test_the_command(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, path = tmp_path / "model", tmp_path / "tables.json"
    model.save_pretrained(folder)
    WORDS.save_pretrained(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    few = ("--texts", "2", "--validation", "1", "--length", "120", "--trials", "2", "--budgets", "1/2", "--least", "1")
    command = ("calibrate", "tables", str(folder), "--output", str(path), "--text", str(tmp_path / "text.txt"), *few)
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "head weights" in printed and "entries held" in printed and str(path) in printed
    tables = load_compiled_tables(path)
    assert (tables.budgets, tables.texts, tables.settings["length"]) == ((0.5,), 2, 120)
    HeadKVCache(LlamaForCausalLM.from_pretrained(folder), "compilerkv", tables=str(path))
    assert cli.main((*command, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == json.loads(path.read_text())["sha256"]
    assert cli.main((*command[:-2], "--budgets", "64")) == 2
    assert "budgets must be shares" in capsys.readouterr().err


def test_the_shipped_tables_fit_the_embedded_model() -> None:
    """They have to be compiled again whenever the weights change, see docs/methods.md."""
    model = LlamaForCausalLM.from_pretrained(demo.text_model_path())
    tables = compiled_tables_for(model)
    assert (tables.layers, tables.kv_heads, tables.texts) == (4, 4, 48)
    assert len(tables.log) == 48 + 2
    assert all(row["compiled"] < row["identity"] for row in tables.validation)
    assert tables.validation[0]["held"] < 0.9, "the gate saves entries at the largest budget"
