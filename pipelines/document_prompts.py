# SPDX-License-Identifier: Apache-2.0
"""The prompt around a document and a question, cut where the document ends.

The tokens of the document part are the same for every question, so that it is read and compressed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DOCUMENT, _QUESTION = "headkvmmdocument", "headkvmmquestion"  # stand for the two texts while a template is rendered
_GAP = "\n\n"
_INSTRUCTION = "Answer the question from the text above.\nQuestion: "
_ANCHOR = "a."  # some text before a gap, so that what follows is encoded as in the middle of a text


@dataclass(frozen=True)
class PromptFormat:
    """What stands around a document and a question.

    Attributes:
        before: what comes before the document.
        between: what comes between the blank line after the document and the question.
        after: what comes after the question; the answer follows.
        chat: whether this is a chat template, whose control tokens are written out in the text.
    """

    before: str
    between: str
    after: str
    chat: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
        """The format for a tokenizer: its chat template, or plain "Question: ... Answer:" without one.

        Raises:
            ValueError: if the chat template cannot be used for a document and a question.
        """
        if not getattr(tokenizer, "chat_template", None):
            return cls(before="", between="Question: ", after="\nAnswer:", chat=False)
        message = {"role": "user", "content": f"{_DOCUMENT}{_GAP}{_INSTRUCTION}{_QUESTION}"}
        try:
            text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja's own errors, and whatever a template raises
            raise ValueError(f"the chat template of the tokenizer fails: {' '.join(str(error).split())}") from error
        before, document, rest = str(text).partition(_DOCUMENT + _GAP)
        between, question, after = rest.partition(_QUESTION)
        if not document or not question or _DOCUMENT in rest or _QUESTION in after:
            raise ValueError(
                "the chat template of the tokenizer does not show a user's text once and unchanged; "
                "set tokenizer.chat_template = None for a plain prompt"
            )
        return cls(before=before, between=between, after=after, chat=True)

    def document_ids(self, tokenizer: PreTrainedTokenizerBase, document: str) -> list[int]:
        """Tokens of the part that holds the document, with the tokenizer's first token if it has one.

        Control tokens that the document's text spells out are read as plain text.
        """
        start = _encode(tokenizer, self.before) if self.chat else _first_token(tokenizer)
        if not self.before:
            return [*start, *_encode(tokenizer, document + _GAP, plain=True)]
        return [*start, *_continued(tokenizer, document + _GAP, after=self.before)]

    def question_ids(self, tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
        """Tokens of the part that follows: the question and what leads to the answer."""
        if not self.chat:
            return _continued(tokenizer, self.between + question + self.after, after=_ANCHOR + _GAP)
        asked = _continued(tokenizer, self.between + question, after=_ANCHOR + _GAP)
        return [*asked, *_continued(tokenizer, self.after, after=_ANCHOR, plain=False)]


def _first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-text token, if this tokenizer puts one before a text."""
    first = tokenizer.bos_token_id
    with_specials = tokenizer("a", add_special_tokens=True)["input_ids"]
    return [int(first)] if first is not None and with_specials[:1] == [first] else []


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, plain: bool = False) -> list[int]:
    """Tokens of a text and nothing around it; `plain` reads control tokens in it as text."""
    options: dict[str, Any] = {"split_special_tokens": True} if plain else {}
    ids: list[int] = tokenizer(text, add_special_tokens=False, **options)["input_ids"]
    return ids


def _continued(tokenizer: PreTrainedTokenizerBase, text: str, *, after: str, plain: bool = True) -> list[int]:
    """Tokens of a text that continues another, without the mark that some tokenizers put at the start of a text."""
    start, both = _encode(tokenizer, after, plain=plain), _encode(tokenizer, after + text, plain=plain)
    return both[len(start) :] if both[: len(start)] == start else _encode(tokenizer, text, plain=plain)
