# SPDX-License-Identifier: Apache-2.0
"""The compilation of `compilerkv`'s tables (arXiv 2602.08686): roll-outs with perturbed tables, then Q-learning."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from headkv_mm.allocators import RiskGate
from headkv_mm.calibration.compiling import GATE_ACTIONS, WEIGHT_ACTIONS, Bins, compiled
from headkv_mm.calibration.continued_texts import ContinuedText, continued_texts
from headkv_mm.calibration.partial import load_partial, save_partial
from headkv_mm.calibration.rollouts import ReadText, full_run
from headkv_mm.calibration.texts import check_positions, identity_of
from headkv_mm.calibration.watching import watched
from headkv_mm.compiled_tables import CompiledTables
from headkv_mm.evaluation.origin import versions
from headkv_mm.fingerprint import fingerprint
from headkv_mm.text_plan import SMALLEST

FORMAT = "headkv-mm compiled tables in progress"
_IDENTITY_WEIGHT, _IDENTITY_GATE = WEIGHT_ACTIONS.index(1.0), GATE_ACTIONS.index(0.0)


@dataclass(frozen=True)
class TablesCalibration:
    """How to compile.

    Attributes:
        texts: how many are read for roll-outs.
        validation: how many more are read to compare the tables with identity tables.
        length: tokens of a text, about.
        following: how many of them follow the eviction, in a text of the user's; generated ones end with questions.
        budgets: shares of a text that are kept, each in its own roll-outs.
        trials: roll-outs of a text and budget: of every two, one with other weights and one with other thresholds.
        window: queries that are looked at, and newest tokens that stay.
        entropy_bins, perplexity_bins: of the gate, as equally filled as the texts allow.
        least: trials that an action must have in a cell before it can be chosen there.
        price: nats that holding the whole budget costs; with 0 a threshold is chosen only if it does no harm.
        seed: chooses the texts and what is tried.

    Raises:
        ValueError: for a number out of range.
    """

    texts: int = 48
    validation: int = 12
    length: int = 1024
    following: int = 64
    budgets: tuple[float, ...] = (1 / 4, 1 / 8, 1 / 16)
    trials: int = 8
    window: int = 32
    entropy_bins: int = 20
    perplexity_bins: int = 4
    least: int = 8
    price: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"texts": 1, "validation": 0, "following": 2, "trials": 2, "window": 1, "seed": 0, "least": 1}
        for name, number in {**least, "entropy_bins": 1, "perplexity_bins": 1}.items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} must be at least {number}, got {getattr(self, name)}")
        if not self.budgets or not all(isinstance(budget, float) and 0 < budget < 1 for budget in self.budgets):
            raise ValueError(f"budgets must be shares between 0 and 1, got {', '.join(map(str, self.budgets))}")
        if self.price < 0:
            raise ValueError(f"price must not be negative, got {self.price}")
        shortest = self.following + 2 * SMALLEST
        if self.length < shortest:
            raise ValueError(
                f"of a text of {self.length} tokens, {self.following} follow the eviction, and too few are left to "
                f"choose among: use a length of at least {shortest}"
            )


@torch.no_grad()
def calibrate_tables(
    model: Any,
    tokenizer: Any,
    calibration: TablesCalibration | None = None,
    *,
    text: str | None = None,
    partial: Path | None = None,
    on_text: Callable[[int], object] = lambda done: None,
) -> CompiledTables:
    """Compile tables for a model.

    Every text is read once for each budget; then the model goes on many times, teacher forced, with tables that were
    perturbed by chance. A roll-out's reward is the loss with identity tables less its own, so what the full cache
    would lose cancels out; cells learn from the rewards which of their actions is best. Texts kept apart tell whether
    the tables are better than identity tables.

    Args:
        model: a causal language model of transformers, on its device; it is the same afterwards.
        tokenizer: its tokenizer.
        calibration: the settings; the defaults if None.
        text: texts are cut from it, one after the other; None for generated documents with questions.
        partial: file that keeps what is done, to go on from after a break; removed at the end. None for no file.
        on_text: called with the number of texts read, at the beginning and after each one.

    Raises:
        ValueError: if the text is too short, the texts do not fit the model, its attention cannot be compressed, or
            `partial` is of other settings.
    """
    calibration = calibration or TablesCalibration()
    check_positions(model, calibration.length)
    texts = continued_texts(
        tokenizer,
        texts=calibration.texts + calibration.validation,
        length=calibration.length,
        following=calibration.following,
        seed=calibration.seed,
        text=text,
    )
    check_positions(model, max(len(one.read) + len(one.following) for one in texts))
    stated = {**asdict(calibration), "budgets": list(calibration.budgets), "dtype": str(model.dtype)}
    stated["text"] = identity_of(text)
    settings = {**stated, "fingerprint": fingerprint(model)}
    found = None if partial is None else load_partial(partial, FORMAT, settings)
    progress: dict[str, Any] = found or {"records": []}
    records: list[dict[str, Any]] = progress["records"]
    training = model.training
    model.eval()
    try:
        on_text(len(records))
        with watched(model):
            for index in range(len(records), calibration.texts):
                records.append(_record(model, texts[index], calibration, index))
                if partial is not None:
                    save_partial(partial, FORMAT, settings, progress)
                on_text(len(records))
            tables = compiled(records, calibration.budgets, _bins(calibration), calibration.least, calibration.price)
            validation = []
            for index, one in enumerate(texts[calibration.texts :], calibration.texts + 1):
                validation.append(_validated(model, one, calibration, tables.weights, tables.gate))
                on_text(index)
    finally:
        model.train(training)
    if partial is not None:
        partial.unlink(missing_ok=True)
    return CompiledTables(
        fingerprint=settings["fingerprint"],
        head_weights=tables.weights,
        gate=tables.gate.gate or (),
        entropy_edges=tables.gate.entropy_edges,
        perplexity_edges=tables.gate.perplexity_edges,
        head_support=tables.weight_support,
        gate_support=tables.gate_support,
        budgets=calibration.budgets,
        texts=calibration.texts,
        validation=tuple(_means(calibration.budgets, validation)),
        log=tables.log,
        settings={name: value for name, value in stated.items() if name not in ("texts", "budgets")},
        versions=versions(),
    )


def _bins(calibration: TablesCalibration) -> Bins:
    return Bins(calibration.entropy_bins, calibration.perplexity_bins)


def _record(model: Any, text: ContinuedText, calibration: TablesCalibration, index: int) -> dict[str, Any]:
    """All roll-outs of one text, as JSON types."""
    rng = random.Random(f"trials {calibration.seed} {index}")
    full, perplexity = full_run(model, text, calibration.window)
    budgets = []
    entropies: list[float] = []
    for budget in calibration.budgets:
        read = ReadText(model, text, budget, calibration.window)
        heads = read.kv_heads
        identity, entropies = read.identity()
        trials = []
        for trial in range(calibration.trials):
            weights = [[_IDENTITY_WEIGHT] * heads for _ in range(read.layers)]
            gate = [_IDENTITY_GATE] * read.layers
            # One table at a time, or what the gate gives up would drown what the weights change.
            if trial % 2:
                gate = [rng.randrange(len(GATE_ACTIONS)) for _ in gate]
            else:
                weights = [[rng.randrange(len(WEIGHT_ACTIONS)) for _ in row] for row in weights]
            outcome = read.outcome(
                [[WEIGHT_ACTIONS[one] for one in row] for row in weights], [GATE_ACTIONS[one] for one in gate]
            )
            actions = {"gate": gate} if trial % 2 else {"weights": weights}
            trials.append({**actions, "loss": outcome.loss, "held": outcome.held / identity.held})
        budgets.append({"identity": identity.loss, "trials": trials})
    return {"full": full, "perplexity": perplexity, "entropies": entropies, "budgets": budgets}


def _validated(
    model: Any, text: ContinuedText, calibration: TablesCalibration, weights: Sequence[Sequence[float]], gate: RiskGate
) -> list[tuple[float, float, float, float]]:
    """By budget: the losses with the full cache, identity tables and these, and the share of entries they hold."""
    full, _ = full_run(model, text, calibration.window)
    found = []
    for budget in calibration.budgets:
        read = ReadText(model, text, budget, calibration.window)
        identity, _ = read.identity()
        outcome = read.with_gate(weights, gate)
        found.append((full, identity.loss, outcome.loss, outcome.held / identity.held))
    return found


def _means(budgets: Sequence[float], found: Sequence[Sequence[Sequence[float]]]) -> list[dict[str, float]]:
    """Means over the texts by budget."""
    if not found:
        return []
    names = ("full", "identity", "compiled", "held")
    return [
        {
            "budget": budget,
            **{name: sum(text[index][at] for text in found) / len(found) for at, name in enumerate(names)},
        }
        for index, budget in enumerate(budgets)
    ]
