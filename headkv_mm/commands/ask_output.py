# SPDX-License-Identifier: Apache-2.0
"""What `headkv-mm ask` prints and draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headkv_mm.commands.output_folder import OutputFolder
    from headkv_mm.pipelines import Answer, Document, DocumentReport

_KNOWN = 0.9  # share of the words below which the embedded model is no use


@dataclass(frozen=True)
class Given:
    """What is asked about what.

    Attributes:
        documents: the files.
        questions: the questions, in order.
        saved: whether the file is a compressed document.
        scorers: for questions whose right answer is known, what scores an answer from 0 to 1.
    """

    documents: list[Path]
    questions: list[str]
    saved: bool = False
    scorers: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def example(cls, name: str, questions: list[str]) -> Given:
        """An example that ships with the library, with its own questions unless others are asked."""
        from headkv_mm.demo.documents import score_answer
        from headkv_mm.demo.documents.examples import example_documents, make_example

        (example,) = (item for item in example_documents() if item.name == name)
        known = {item.text: item for item in make_example(name).questions}
        scorers = {text: lambda answer, item=item: score_answer(item, answer) for text, item in known.items()}
        return cls([example.document], questions or list(known), scorers=scorers)

    def score(self, question: str, answer: str) -> float | None:
        """Share of the right answer's values that an answer holds; None where nobody knows."""
        scorer = self.scorers.get(question)
        return None if scorer is None else float(scorer(answer))


def notes(document: Document, given: Given, *, embedded: bool) -> list[str]:
    """What a user should know about the answers, honestly."""
    report, found = document.report, []
    if report.query_aware:
        found.append(
            "The document was compressed knowing each question; without --query-aware it is compressed once, for any."
        )
    asked, words = document.count_known_words(" ".join(given.questions))
    unknown = (report.words - report.known_words) + (words - asked)
    if embedded:
        found.append(
            'The embedded model is small and reads only notes such as the example: facts like "The code of the warm '
            'river is 2998.", several values, lists and chains of neighbours, and questions about them. It is no '
            "reader of other texts: give a language model with --model for those."
        )
    if embedded or unknown:
        found.append(
            f"The model knows {report.known_words} of {report.words} words of the document and {asked} of {words} of "
            "the questions."
        )
    if report.words and report.known_words < _KNOWN * report.words:
        found.append("Most of what the document says is lost to it: do not trust the answers.")
    elif asked < words:
        found.append("A question with unknown words is not understood: do not trust its answer.")
    return found


class Table:
    """Prints answers as they come, and numbers at the end.

    Attributes:
        documents: the reports of the documents, for JSON.
    """

    def __init__(self, *, silent: bool) -> None:
        self.documents: list[dict[str, Any]] = []
        self._silent = silent
        self._rows: list[tuple[str, ...]] = []

    def document(self, name: str, report: DocumentReport) -> None:
        """A document was read."""
        self.documents.append({"cache": name, **report.to_dict()})
        if not self._silent:
            print(f"{', '.join(Path(path).name for path in report.names)}: {report}", flush=True)

    def question(self, number: int, question: str) -> None:
        """A question comes next."""
        if not self._silent:
            print(f"\n{number}. {question}", flush=True)

    def pieces(self, report: DocumentReport, pieces: Iterable[str]) -> None:
        """Take an answer piece by piece."""
        if not self._silent:
            print(f"   {_name(report)}: ", end="", flush=True)
        for piece in pieces:
            if not self._silent:
                print(piece.replace("\n", "\n   "), end="", flush=True)

    def answer(self, number: int, answer: Answer, score: float | None) -> None:
        """An answer is complete."""
        from headkv_mm.pipelines.outputs import format_bytes

        if not self._silent:
            right = "" if score is None else " [right]" if score == 1 else f" [wrong: {score:.0%} of the values]"
            print(f"{'' if answer.complete else ' ...'}{right}", flush=True)
        speed = "-" if answer.tokens_per_second is None else f"{answer.tokens_per_second:.0f}"
        self._rows.append(
            (
                str(number),
                _name(answer),
                format_bytes(answer.nbytes),
                f"{answer.ratio:.1%}",
                f"{answer.kept:.0f} of {answer.document_tokens}",
                f"{answer.seconds_to_first_token:.3f} s",
                speed,
            )
        )

    def finish(self, remarks: list[str]) -> None:
        """Print the numbers and the notes."""
        if self._silent:
            return
        print()
        if self._rows:
            header = ("", "cache", "held", "of full", "tokens kept", "first token", "tokens/s")
            rows = [header, *self._rows]
            widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
            for row in rows:
                cells = [
                    f"{cell:<{width}}" if index == 1 else f"{cell:>{width}}"
                    for index, (cell, width) in enumerate(zip(row, widths))
                ]
                print("  ".join(cells).rstrip())
            print()
        for remark in remarks:
            print(f"note: {remark}")


def write_pictures(files: OutputFolder, documents: list[tuple[str, Document]]) -> list[str]:
    """Draw the map of every compressed document; returns the names of the files."""
    from headkv_mm.plots_text import document_map

    for name, document in documents:
        report = document.report
        title = f"What each head kept of the document: {_name(report)}"
        if report.question is not None:
            title += f'\ncompressed knowing "{report.question}"'
        figure = document_map(document.kept_positions(), report.tokens, title)
        figure.savefig(files.new(name), format="png")
    return [name for name, _ in documents]


def _name(report: DocumentReport | Answer) -> str:
    from headkv_mm.pipelines.text_reports import cache_name

    return cache_name(report.method, report.budget)
