# SPDX-License-Identifier: Apache-2.0
"""What the embedded language model is trained on, and when: lengths, mix of tasks, learning rate."""

from __future__ import annotations

import random
from dataclasses import dataclass

from headkv_mm.demo.text_training import TextBatch, text_batch

TOKENS_PER_STEP = 4096
WARM_UP_STEPS = 40
FORGETFUL_RATE = 0.1  # share of the learning rate at which the forgetful phase begins
CONSTANT_SHARE = 1 / 4  # of the tokens, at the full learning rate
LEAST_STEPS, MOST_STEPS = 40, 300  # in one stage
LAST_RATE = 0.02  # share of the learning rate that is left at the end
FIRST_MIX = {"number": 5.0, "joint": 1.0, "values": 1.0, "chain": 1.5, "list": 1.5}
FULL_MIX = {"number": 2.5, "joint": 2.5, "values": 3.0, "chain": 2.0, "list": 2.5, "route": 0.5, "frequent": 0.1}


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum; it ends when the smoothed loss on the answers' values is below `enough`, or late."""

    length: int
    rows: int
    mix: dict[str, float] | None
    enough: float

    def is_over(self, steps: int, loss: float) -> bool:
        """Whether to go on to the next stage after some steps in this one."""
        return steps >= MOST_STEPS or (steps >= LEAST_STEPS and loss < self.enough)


STAGES: tuple[Stage, ...] = (
    Stage(80, 24, None, 0.5),
    Stage(128, 20, FIRST_MIX, 0.2),
    Stage(192, 16, FIRST_MIX, 0.2),
    Stage(256, 14, FIRST_MIX, 0.2),
    Stage(512, 8, FULL_MIX, 0.2),
)
MIXED_LENGTHS = {128: 0.02, 256: 0.08, 512: 0.2, 1024: 0.25, 2048: 0.25, 2560: 0.2}


def next_batch(seed: int, step: int, stage: int) -> TextBatch:
    """The batch of a step; equal arguments give equal batches, so that a resumed run goes on as it would have.

    Args:
        seed: seed of the run.
        step: number of the step.
        stage: index into `STAGES`; `len(STAGES)` means mixed lengths.
    """
    rng = random.Random(f"{seed} {step}")
    if stage < len(STAGES):
        plan = STAGES[stage]
        mix = None if stage == 1 and step % 5 == 0 else plan.mix
        jumps = 2 if stage > 3 and rng.random() < 0.25 else 0
        return text_batch(rng, plan.length, plan.rows, mix, jumps)
    length = rng.choices(list(MIXED_LENGTHS), list(MIXED_LENGTHS.values()))[0]
    jumps = rng.randint(1, 3) if rng.random() < 0.35 else 0
    return text_batch(rng, length, max(1, TOKENS_PER_STEP // length), FULL_MIX, jumps)


def learning_rate_factor(step: int, tokens: int, total: int, forgetful: int = 0) -> float:
    """Warm-up over the first steps, constant up to a quarter of the tokens, then a parabola down to almost nothing.

    The forgetful phase that follows begins again, lower, and goes down in a straight line.
    """
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    if forgetful and tokens >= total:
        return FORGETFUL_RATE * max(LAST_RATE, 1 - (tokens - total) / forgetful)
    done = tokens / total
    return warm_up * (1.0 if done < CONSTANT_SHARE else max(LAST_RATE, ((1 - done) / (1 - CONSTANT_SHARE)) ** 2))
