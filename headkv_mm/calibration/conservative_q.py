# SPDX-License-Identifier: Apache-2.0
"""Conservative Q-learning of one step in a table: which action is best in every state, by what was tried there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CONSERVATISM = 0.75
_RATE, _STEPS, _CLOSE = 1.0, 20_000, 1e-10


@dataclass(frozen=True)
class Trial:
    """What was done at once, and what came of it.

    Attributes:
        states: which states it visited, none twice.
        actions: one for each.
        reward: the same for all of them.
    """

    states: Sequence[int]
    actions: Sequence[int]
    reward: float


@dataclass(frozen=True)
class Fitted:
    """What the trials say.

    Attributes:
        values: [S, A] float64, the learned Q.
        counts: [S, A] int64, trials by state and action.
    """

    values: Tensor
    counts: Tensor

    def choices(self, identity: int, least: int) -> Tensor:
        """The best action in every state, [S] int64.

        Only actions of at least `least` trials can be chosen. Where the identity itself has fewer, nothing can be
        compared, and it is the choice. Of equal ones the identity is better, then the first.
        """
        supported = self.counts >= least
        values = self.values.masked_fill(~supported, float("-inf"))
        best = values.argmax(-1)
        own = values[:, identity]
        better = supported[:, identity] & (values.max(-1).values > own)
        return torch.where(better, best, identity)


def fit(trials: Sequence[Trial], states: int, actions: int, conservatism: float = CONSERVATISM) -> Fitted:
    """Learn Q[state, action] from trials.

    Every state minimises, over its trials with action a and reward r, the mean of
    `conservatism (logsumexp Q - Q_a) + (Q_a - r)^2 / 2` (arXiv 2602.08686): actions that were tried seldom are valued
    low. It depends on counts and mean rewards only and is convex, so plain descent finds the one minimum, whatever the
    order of the trials. Actions never tried in a state would fall for ever; their Q stays that of no trials, 0.

    Args:
        trials: at least one.
        states: S.
        actions: A.
        conservatism: weight of the first term; 0 gives the mean rewards.
    """
    counts, sums = torch.zeros(states, actions, dtype=torch.int64), torch.zeros(states, actions, dtype=torch.float64)
    for trial in trials:
        place = torch.tensor(trial.states), torch.tensor(trial.actions)
        counts.index_put_(place, torch.ones(len(trial.states), dtype=torch.int64), accumulate=True)
        sums.index_put_(place, torch.full((len(trial.states),), trial.reward, dtype=torch.float64), accumulate=True)
    values = torch.zeros(states, actions, dtype=torch.float64)
    for _ in range(_STEPS):
        step = gradient(values, counts, sums, conservatism)
        values -= _RATE * step
        if float(step.abs().max()) < _CLOSE:
            break
    return Fitted(values, counts)


def gradient(values: Tensor, counts: Tensor, sums: Tensor, conservatism: float) -> Tensor:
    """Of a state's mean loss by its Q, [S, A]; see `fit`. 0 for what was never tried.

    Args:
        values: [S, A] float64, Q.
        counts, sums: [S, A], trials and their rewards added up.
        conservatism: weight of the conservative term.
    """
    tried = counts > 0
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    softmax = values.masked_fill(~tried, float("-inf")).softmax(-1)
    error = values - sums / counts.clamp(min=1)
    return torch.where(tried, conservatism * (softmax - share) + share * error, 0.0)
