# SPDX-License-Identifier: Apache-2.0
"""Generating one answer: its text piece by piece, and when each token came."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from headkv_mm.pipelines.answers import Answer

_UNFINISHED = "\ufffd"  # what the bytes of half a character decode to


class TokenClock(BaseStreamer):
    """Listens to `generate`: tokens of one sequence, the time of each, and the text that is certain so far.

    Args:
        tokenizer: decodes the tokens.
        on_text: receives new text. The pieces together are `text`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None] | None = None) -> None:
        self.ids: list[int] = []
        self.times: list[float] = []
        self._tokenizer, self._on_text = tokenizer, on_text
        self._in_prompt, self._given = True, ""

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt once, then token by token."""
        if self._in_prompt:
            self._in_prompt = False
            return
        self.ids += value.flatten().tolist()
        self.times.append(time.perf_counter())
        if self._on_text is not None:
            text = self.text
            if not text.endswith(_UNFINISHED):
                self._give(text)

    def end(self) -> None:
        """Give out what was held back."""
        if self._on_text is not None:
            self._give(self.text)

    @property
    def text(self) -> str:
        """The text of all tokens, without control tokens and blanks around it."""
        return str(self._tokenizer.decode(self.ids, skip_special_tokens=True)).strip()

    def _give(self, text: str) -> None:
        # A decoder may still change the last word (a blank before a full stop, say): wait until it has not.
        if self._on_text is not None and len(text) > len(self._given) and text.startswith(self._given):
            self._on_text(text[len(self._given) :])
            self._given = text


class _Stop(StoppingCriteria):
    """Ends a generation that nobody listens to any more."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked.is_set(), dtype=torch.bool, device=input_ids.device)


class AnswerStream(Iterator[str]):
    """The pieces of an answer while it is generated; `answer` holds all of it afterwards.

    The generation runs in a thread of its own and ends early with `close()`, or when the stream is used in a `with`
    statement that is left. Another question on the same model should wait until then.

    Args:
        generate: makes the answer, given a function that takes pieces of text and a list of stopping criteria.
    """

    def __init__(self, generate: Callable[[Callable[[str], None], StoppingCriteriaList], Answer]) -> None:
        self._pieces: queue.Queue[str | None] = queue.Queue()
        self._stop = _Stop()
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._over = False
        self._generate = generate
        self._thread = threading.Thread(target=self._run, name="headkv-mm-answer", daemon=True)
        self._thread.start()

    def __next__(self) -> str:
        """The next piece of text.

        Raises:
            StopIteration: at the end; an error of the generation is raised instead.
        """
        if self._over:
            raise StopIteration
        piece = self._pieces.get()
        if piece is None:
            self._over = True
            self._thread.join()
            if self._error is not None:
                raise self._error
            raise StopIteration
        return piece

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            RuntimeError: while there are pieces left, or after an early `close()`.
        """
        if self._answer is None or not self._over:
            raise RuntimeError("the answer is not complete: take all pieces from the stream first")
        return self._answer

    def close(self) -> None:
        """End the generation now and wait for it; the rest of the pieces is dropped."""
        if not self._over:
            self._stop.asked.set()
            self._thread.join()
            self._over, self._answer = True, None

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._answer = self._generate(self._pieces.put, StoppingCriteriaList([self._stop]))
        except BaseException as error:  # handed to whoever reads the stream
            self._error = error
        finally:
            self._pieces.put(None)
