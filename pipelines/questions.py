# SPDX-License-Identifier: Apache-2.0
"""What may be asked: questions, lengths, and the settings of an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headkv_mm.pipelines.defaults import QUESTION_ROOM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_RULED = ("attention_mask", "input_ids", "past_key_values", "stopping_criteria", "streamer", "use_cache")


def check_question(question: Any) -> str:
    """A question that can be asked, without blanks around it.

    Raises:
        TypeError: if it is no text.
        ValueError: if there is nothing in it.
    """
    if not isinstance(question, str):
        raise TypeError(f"a question must be text, got {type(question).__name__}")
    if not question.strip():
        raise ValueError("the question is empty: say what to look for")
    return question.strip()


def check_count(name: str, value: object) -> int:
    """A positive whole number.

    Raises:
        ValueError: if it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    return value


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that a model can tell apart by position; None if it states no limit."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_length(model: PreTrainedModel, *, document: int, question: int | None, answer: int) -> None:
    """Refuse what is longer than the model's positions.

    Args:
        model: states its positions.
        document: tokens of the document.
        question: tokens of the question; None if it is not known yet.
        answer: tokens that the answer may take.

    Raises:
        ValueError: with the lengths.
    """
    limit = max_positions(model)
    needed = document + (QUESTION_ROOM if question is None else question) + answer
    if limit is not None and needed > limit:
        what = f"{QUESTION_ROOM} kept free for a question" if question is None else f"{question} of the question"
        raise ValueError(
            f"the document is {document} tokens long and the model has {limit} positions: with {what} and {answer} for "
            f"an answer that makes {needed}; shorten one of them, or take a model for longer texts"
        )


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: those of the model, or that of the tokenizer."""
    found = model.generation_config.eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    return [] if found is None else [int(token) for token in (found if isinstance(found, list) else [found])]


def answer_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], *, max_new_tokens: int
) -> dict[str, Any]:
    """What an answer is generated with: the settings of a call, greedy by default.

    Args:
        model, tokenizer: say how an answer ends.
        settings: arguments for `generate`.
        max_new_tokens: longest answer, unless the settings say so.

    Raises:
        TypeError: for a setting that the document rules.
        ValueError: for a length below 1, or several sequences.
    """
    ruled = sorted(set(settings) & set(_RULED))
    if ruled:
        raise TypeError(f"ask() has no argument {', '.join(map(repr, ruled))}: the document gives it")
    for name in ("num_beams", "num_return_sequences"):
        if settings.get(name, 1) != 1:
            raise ValueError(f"{name} must be 1, for an answer comes token by token: use the task text-generation")
    ends, pad = end_tokens(model, tokenizer), model.generation_config.pad_token_id
    chosen: dict[str, Any] = {"do_sample": False}
    if not settings.get("do_sample"):
        chosen.update(temperature=None, top_p=None, top_k=None)  # of a model that samples by default
    chosen.update(settings)
    chosen["max_new_tokens"] = check_count("max_new_tokens", settings.get("max_new_tokens", max_new_tokens))
    return {**chosen, "eos_token_id": ends, "pad_token_id": ends[0] if pad is None else pad}
