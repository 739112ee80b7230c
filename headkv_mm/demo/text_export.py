# SPDX-License-Identifier: Apache-2.0
"""Export of the embedded language model: a folder that stock transformers loads, with its card and its scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headkv_mm.demo.export import new_model_folder, write_model, write_texts
from headkv_mm.demo.text_tokenizer import build_text_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def export_text_model(
    model: LlamaForCausalLM, folder: Path, evaluation: dict[str, Any], training: dict[str, Any]
) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load: weights in float16, card, scores.

    The folder is complete from the moment it appears; an older one is replaced.

    Args:
        model: trained model; it is not changed.
        folder: where to write.
        evaluation: what `evaluate_text_model` returned.
        training: JSON data about the training run.
    """
    from transformers import GenerationConfig, LlamaForCausalLM

    with new_model_folder(folder) as new:
        config = model.config
        half = LlamaForCausalLM(config).to(torch.float16)
        half.load_state_dict(model.state_dict())
        half.generation_config = GenerationConfig(
            do_sample=False,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
        )
        write_model(half, new)
        build_text_tokenizer().save_pretrained(new)
        write_scores(new, evaluation, training)


def write_scores(folder: Path, evaluation: dict[str, Any], training: dict[str, Any]) -> None:
    """Write or replace the card and the scores of an exported model."""
    write_texts(folder, model_card(evaluation, training), evaluation, training)


def model_card(evaluation: dict[str, Any], training: dict[str, Any]) -> str:
    """The folder's README with the measured numbers."""
    results = evaluation["results"]
    seeds = sorted({result["seed"] for result in results})
    lengths = sorted({result["length"] for result in results})
    tasks = list(dict.fromkeys(task for result in results for task in result["tasks"]))

    def percent(values: list[float]) -> str:
        return f"{100 * sum(values) / len(values):.1f} %"

    gate = [f"| prompt tokens | {' | '.join(f'seed {seed}' for seed in seeds)} |", "|---" * (len(seeds) + 1) + "|"]
    by_task = [f"| task | {' | '.join(str(length) for length in lengths)} |", "|---" * (len(lengths) + 1) + "|"]
    for length in lengths:
        cells = [
            percent([item["exact"] for item in results if (item["length"], item["seed"]) == (length, seed)])
            for seed in seeds
        ]
        gate.append(f"| {length} | {' | '.join(cells)} |")
    for task in tasks:
        cells = [percent([item["tasks"][task] for item in results if item["length"] == length]) for length in lengths]
        by_task.append(f"| {task} | {' | '.join(cells)} |")
    return _CARD.format(
        gate="\n".join(gate),
        by_task="\n".join(by_task),
        documents=evaluation["documents"],
        tokens=training["tokens"] / 1e6,
        steps=training["step"],
        minutes=training["seconds"] / 60,
        threads=training["threads"],
        seed=training["seed"],
        forgetful=_forgetful(training),
        note=f"\n{training['note']}\n" if training.get("note") else "",
    )


def _forgetful(training: dict[str, Any]) -> str:
    if not training.get("forgetful_tokens"):
        return "Every token could see all tokens before it in the whole of training."
    return (
        f"In the last {training['forgetful_tokens'] / 1e6:.1f} M tokens, every second batch of rows up to 1024 tokens "
        "was trained with dropout of past entries: each KV head lost a random share of the document for the tokens of "
        "questions and answers, but never the sentences that hold the answers."
    )


_CARD = """---
license: apache-2.0
pipeline_tag: text-generation
---
# Facts in documents: a small retrieval language model

A Llama (4 layers, width 128, 8 query heads on 4 KV heads of size 32, 1.04 M parameters, tied embeddings) that reads a
document of facts and answers questions about it. It loads with stock `LlamaForCausalLM`, without code of its own.
Positions go up to 4096, the longest training row had 2560 tokens.

The weights are stored in float16 and load as float32 unless you ask for another dtype.

It exists to test and to show KV cache compression for language models on any computer. It knows 405 tokens and nothing
of the world. A word it does not know becomes `<unk>`, so it cannot answer questions about real texts.

## What it can answer

    The warm river ... The code of the warm river is 2998. It was rainy on monday, and the clerk stood in the yard. ...

    Question: What is the code of the warm river?
    Answer: The code of the warm river is 2998.

The answer repeats the sentence that holds it. Facts have this form and no other:

- `The code of the warm river is 2998.` (code, price, weight, level, number or age; four digits; tasks `single`,
  `multi-key`, `two-turn`), and several in one question (`What is the code of the warm river and the price of the old
  mill?`, `multi-query`);
- `The code of the warm river on monday is 2998.`, up to thursday (`What are the three codes of the warm river?`,
  `multi-value`);
- `The neighbour of the warm river is the old mill.` (`What is the code of the neighbour of the warm river?`,
  `variable-tracking`);
- `The list of the warm river is salt, tea, ink.` (`What is the list of the warm river?`, `list`);
- `The code of the warm river is 2998, then the old mill.` (`What are all codes of the route from the warm river?`,
  `long-generation`);
- `The bird calls blim.` (`Which word is the word that the bird calls most?`, `frequent-words`).

In one document no two names share a word, no two numbers begin with the same two digits and no item is in two lists, as
long as there are enough of them. Facts that are alike in more than that confuse this model.

## Training

From nothing, on documents generated on the fly: `python scripts/train_demo_text.py --output language`, {tokens:.1f} M
tokens, {steps:,} steps, {minutes:.0f} minutes with {threads} CPU thread(s), seed {seed}. First repeated random
segments, then documents of 128, 192, 256 and 512 tokens, each until the loss was small, then mixed lengths of 128 to
2560 tokens; a third of those batches skipped positions, so that short rows taught long distances. One name ("warm
river") in eight, chosen by a hash, was never trained on; the scores below are of documents with only such names.

{forgetful}
{note}
## Scores

Greedy decoding with `generate`, full cache, {documents} unseen documents for every length and seed. Right means that
all values of all questions are in the answers, in order.

{gate}

By task, over all seeds:

{by_task}

Routes and most frequent words are harder and not in this table; the library's evaluation measures them.
"""
