# SPDX-License-Identifier: Apache-2.0
"""From roll-outs to `compilerkv`'s tables: bins, rewards, and what conservative Q-learning chooses."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headkv_mm.allocators import RiskGate
from headkv_mm.calibration.conservative_q import Fitted, Trial, fit

WEIGHT_ACTIONS = (0.8, 1.0, 1.25, 1.5)
"""What a head's weight can be; 1 is the identity."""
GATE_ACTIONS = (0.0, 0.8, 0.85, 0.9, 0.95, 1.0)
"""What a threshold can be; 0, which lets everything through, is the identity."""

Record = Mapping[str, Any]
"""All roll-outs of one text: losses, entropies, perplexity, and by budget what was tried."""


@dataclass(frozen=True)
class Bins:
    """How many bins the gate has, of entropy and of perplexity."""

    entropy: int
    perplexity: int


@dataclass(frozen=True)
class Compiled:
    """Both tables.

    Attributes:
        weights: [L][G].
        gate: with its edges.
        weight_support, gate_support: roll-outs that visited each cell.
        log: JSON data, text by text and then table by table.
    """

    weights: tuple[tuple[float, ...], ...]
    gate: RiskGate
    weight_support: tuple[Any, ...]
    gate_support: tuple[Any, ...]
    log: tuple[dict[str, Any], ...]


def compiled(records: Sequence[Record], budgets: Sequence[float], bins: Bins, least: int, price: float) -> Compiled:
    """Learn both tables.

    Args:
        records: one for every text, at least one.
        budgets: those of the records.
        bins: of the gate.
        least: trials that an action must have in a cell before it can be chosen there.
        price: nats that holding the whole budget costs.
    """
    layers = len(records[0]["entropies"])
    entropy_edges = quantile_edges([one for record in records for one in record["entropies"]], bins.entropy)
    perplexity_edges = quantile_edges([record["perplexity"] for record in records], bins.perplexity)
    shape = (layers, bins.entropy, bins.perplexity + 1)
    weight_trials: list[Trial] = []
    gate_trials: list[Trial] = []
    for record in records:
        column = bisect_right(perplexity_edges, record["perplexity"])
        rows = [
            layer * bins.entropy + bisect_right(entropy_edges, entropy)
            for layer, entropy in enumerate(record["entropies"])
        ]
        # Each layer's cell twice: for this perplexity, and for one that is not known.
        cells = [row * shape[2] + place for place in (column, bins.perplexity) for row in rows]
        for part in record["budgets"]:
            for trial in part["trials"]:
                reward = part["identity"] - trial["loss"] + price * (1.0 - trial["held"])
                if "gate" in trial:
                    gate_trials.append(Trial(cells, list(trial["gate"]) * 2, reward))
                else:
                    flat = [action for row in trial["weights"] for action in row]
                    weight_trials.append(Trial(range(len(flat)), flat, reward))
    heads = len(weight_trials[0].actions) // layers
    weights, weight_fit, weight_note = _learned(weight_trials, layers * heads, WEIGHT_ACTIONS, 1.0, least)
    gates, gate_fit, gate_note = _learned(gate_trials, shape[0] * shape[1] * shape[2], GATE_ACTIONS, 0.0, least)
    gate = RiskGate(gate=_nested(gates.view(shape)), entropy_edges=entropy_edges, perplexity_edges=perplexity_edges)
    log = [_line(number, record, budgets) for number, record in enumerate(records)]
    return Compiled(
        weights=_nested(weights.view(layers, heads)),
        gate=gate,
        weight_support=_nested(weight_fit.counts.sum(-1).view(layers, heads)),
        gate_support=_nested(gate_fit.counts.sum(-1).view(shape)),
        log=(*log, {"table": "head_weights", **weight_note}, {"table": "gate", **gate_note}),
    )


def quantile_edges(values: Sequence[float], bins: int) -> tuple[float, ...]:
    """Edges between bins that hold as many of the values as each other, [bins - 1]."""
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    wanted = torch.arange(1, bins, dtype=torch.float64) / bins
    return tuple(ordered.quantile(wanted).tolist()) if bins > 1 else ()


def _learned(
    trials: Sequence[Trial], states: int, actions: Sequence[float], identity: float, least: int
) -> tuple[Tensor, Fitted, dict[str, Any]]:
    """A table's cells [S], what they were learned from, and what to note about it.

    Rewards are divided by their standard deviation, so that the weight of the conservative term means the same for
    every model.
    """
    rewards = torch.tensor([trial.reward for trial in trials], dtype=torch.float64)
    scale = float(rewards.std(correction=0)) or 1.0
    fitted = fit([Trial(one.states, one.actions, one.reward / scale) for one in trials], states, len(actions))
    at = list(actions).index(identity)
    chosen = fitted.choices(at, least)
    note = {
        "trials": len(trials),
        "mean_reward": round(float(rewards.mean()), 5),
        "reward_deviation": round(scale, 5),
        "cells": states,
        "supported": int(((fitted.counts >= least).sum(-1) > 1).sum()),
        "changed": int((chosen != at).sum()),
    }
    return torch.tensor(actions, dtype=torch.float64)[chosen], fitted, note


def _line(number: int, record: Record, budgets: Sequence[float]) -> dict[str, Any]:
    """What to keep of one text's roll-outs: the means over both kinds of trials, by budget."""
    parts = []
    for budget, part in zip(budgets, record["budgets"], strict=True):
        kinds = {
            name: [trial["loss"] for trial in part["trials"] if key in trial]
            for name, key in (("weights", "weights"), ("gates", "gate"))
        }
        means = {name: round(sum(losses) / len(losses), 5) for name, losses in kinds.items() if losses}
        parts.append({"budget": budget, "identity": round(part["identity"], 5), **means})
    return {
        "text": number,
        "perplexity": round(record["perplexity"], 4),
        "full": round(record["full"], 5),
        "budgets": parts,
    }


def _nested(table: Tensor) -> tuple[Any, ...]:
    """A table as nested tuples."""

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    found: tuple[Any, ...] = tuples(table.tolist())
    return found
