# SPDX-License-Identifier: Apache-2.0
"""`headkv-mm ask`: questions about a document, from a compressed cache."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headkv_mm.commands.ask_output import Given, Table, notes, write_pictures
from headkv_mm.commands.compile_kernels import compile_cpu_kernels
from headkv_mm.commands.devices import usable_device
from headkv_mm.commands.option_values import budget, option, whole_number
from headkv_mm.commands.output_folder import OutputFolder
from headkv_mm.pipelines.defaults import CHUNK_SIZE, DEFAULT_BUDGET, MAX_NEW_TOKENS, METHOD

if TYPE_CHECKING:
    from headkv_mm.pipelines import Answer, Document, LongDocumentQAPipeline

HELP = "answer questions about documents from a compressed cache"
EXAMPLE = 'headkv-mm ask report.pdf --question "What is the code of the warm river?" --compare --maps'
FULL = "none"
SAVED = ".kv"
EXAMPLE_DOCUMENT = "notes-1000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.add_argument(
        "documents",
        nargs="*",
        metavar="DOCUMENT",
        help=".txt, .md, .html or .pdf files, read as one text; or one .kv file from --save "
        "(default: an example with its questions)",
    )
    parser.add_argument("--model", metavar="FOLDER", help="model folder (default: the embedded language model)")
    parser.add_argument("--device", help='"cpu", "cuda", ... (default: an accelerator if there is one)')
    asking = parser.add_argument_group("questions")
    asking.add_argument("--question", action="append", default=[], metavar="Q", help="what to ask; repeatable")
    asking.add_argument("--questions-file", metavar="FILE", help="text file with one question per line")
    asking.add_argument(
        "--max-new-tokens",
        type=whole_number(1),
        default=MAX_NEW_TOKENS,
        metavar="N",
        help=f"longest answer (default: {MAX_NEW_TOKENS})",
    )
    asking.add_argument(
        "--temperature", type=float, metavar="T", help="draw answers at this temperature (default: greedy)"
    )
    asking.add_argument("--seed", type=whole_number(0), default=0, metavar="S", help="of drawing (default: 0)")
    compression = parser.add_argument_group("KV cache")
    compression.add_argument(
        "--kv-compression",
        metavar="METHOD",
        help=f"see headkv-mm methods; none for the full cache (default: {METHOD})",
    )
    compression.add_argument(
        "--kv-budget",
        type=budget,
        metavar="BUDGET",
        help="share of the document's tokens kept per KV head (1/4), entries per KV head (256), or bytes (64MiB); "
        f"(default: {DEFAULT_BUDGET})",
    )
    compression.add_argument(
        "--kv-option",
        type=option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the method; repeatable",
    )
    compression.add_argument(
        "--query-aware",
        action="store_true",
        help="read the document again for every question, compressed with the question in sight",
    )
    compression.add_argument(
        "--chunk-size",
        type=whole_number(1),
        default=CHUNK_SIZE,
        metavar="N",
        help=f"tokens of the document that go through the model at once (default: {CHUNK_SIZE})",
    )
    compression.add_argument(
        "--compress-chunks",
        action="store_true",
        help="compress after every chunk instead of once at the end: less memory, worse answers",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--compare", action="store_true", help="also answer from the full cache")
    output.add_argument("--maps", action="store_true", help="draw which parts of the document each head kept")
    output.add_argument(
        "--output", metavar="DIR", help="write answers.json and the maps there (default: output, with --maps)"
    )
    output.add_argument("--save", metavar="FILE.kv", help="write the compressed document, to ask again later")
    output.add_argument("--json", action="store_true", help="print what answers.json holds instead of text")


def run(args: argparse.Namespace) -> int:
    """Read, ask, write the files, print answers and a table."""
    given = _given(args)
    folder = args.output or ("output" if args.maps else None)
    with OutputFolder(folder) if folder else nullcontext() as files:
        qa = _pipeline(args)
        session = _Session(qa, given, args)
        record = session.ask_all()
        if files is not None:
            record["pictures"] = write_pictures(files, session.compressed) if args.maps else []
            files.write_json("answers.json", record)
        if args.save:
            session.compressed[0][1].save(args.save)
    if args.json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return 0
    written = [] if folder is None else [str(Path(folder) / name) for name in (*record["pictures"], "answers.json")]
    for path in [*written, *filter(None, [args.save])]:
        print(path)
    return 0


def _given(args: argparse.Namespace) -> Given:
    """What is asked about what, and whether the options fit together.

    Raises:
        ValueError: if they do not.
        OSError: for a file that cannot be opened.
    """
    questions = [*args.question, *([] if args.questions_file is None else _lines(args.questions_file))]
    if any(not question.strip() for question in questions):
        raise ValueError("a question is empty: say what to look for")
    saved = [path for path in args.documents if Path(path).suffix.lower() == SAVED]
    if saved:
        changed = args.kv_compression or args.kv_budget or args.kv_option
        if len(args.documents) > 1:
            raise ValueError(f"{saved[0]} is a compressed document and stands alone: leave the other documents out")
        if changed or args.compare or args.query_aware or args.save:
            raise ValueError(
                f"{saved[0]} is compressed already: leave --kv-..., --compare, --query-aware and --save out, or give "
                "the documents it was made from"
            )
    for path in args.documents:
        Path(path).stat()  # a missing file should not wait for a model to load
    if args.compare and args.kv_compression == FULL:
        raise ValueError(
            "--compare needs a compression to compare with the full cache: leave --kv-compression none out"
        )
    if args.save and Path(args.save).suffix.lower() != SAVED:
        raise ValueError(f"--save {args.save}: a compressed document is called {SAVED}, such as report{SAVED}")
    if args.save and args.query_aware and len(questions) != 1:
        raise ValueError("--save with --query-aware needs one --question, the one the document is compressed for")
    if args.temperature is not None and args.temperature <= 0:
        raise ValueError(f"--temperature must be above 0, got {args.temperature:g}; leave it out for greedy answers")
    if not args.documents:
        return Given.example(EXAMPLE_DOCUMENT, questions)
    if not questions and not args.save:
        raise ValueError("there is no question: add --question or --questions-file")
    return Given([Path(path) for path in args.documents], questions, saved=bool(saved))


def _lines(path: str) -> list[str]:
    from headkv_mm.pipelines.reading import read_document

    return [line.strip() for line in read_document(path).splitlines() if line.strip()]


def _pipeline(args: argparse.Namespace) -> LongDocumentQAPipeline:
    """The pipeline with all settings of the command line."""
    import headkv_mm

    settings: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "chunk_size": args.chunk_size,
        "compress_chunks": args.compress_chunks,
    }
    if args.kv_compression is not None:
        settings["kv_compression"] = args.kv_compression
    if args.kv_compression != FULL:
        settings.update(kv_budget=args.kv_budget, kv_options=dict(args.kv_option))
    if args.device is not None:
        settings["device"] = usable_device(args.device)
    qa: LongDocumentQAPipeline = headkv_mm.pipeline("long-document-question-answering", args.model, **settings)
    return qa


class _Session:
    """Documents read, questions asked and printed one after the other.

    Attributes:
        compressed: the documents that are compressed as asked, each with the name of its map.
    """

    def __init__(self, qa: LongDocumentQAPipeline, given: Given, args: argparse.Namespace) -> None:
        self.compressed: list[tuple[str, Document]] = []
        self._qa, self._given, self._args = qa, given, args
        self._table = Table(silent=args.json)
        self._answers: list[dict[str, Any]] = []

    def ask_all(self) -> dict[str, Any]:
        """Ask everything; returns what answers.json holds."""
        import torch

        from headkv_mm.commands.versions import versions

        args, given = self._args, self._given
        if self._qa.device.type == "cpu" and args.kv_compression != FULL:
            compile_cpu_kernels((self._qa.model.dtype,))  # not part of the times
        torch.manual_seed(args.seed)
        documents = [] if args.query_aware and given.questions else self._documents(None)
        first = documents
        for number, question in enumerate(given.questions, 1):
            if args.query_aware:
                documents = self._documents(question)
                first = first or documents
            self._table.question(number, question)
            for name, document in documents:
                self._answer(number, question, name, document)
        remarks = notes(first[-1][1], given, embedded=args.model is None)
        self._table.finish(remarks)
        settings = {name: value for name, value in vars(args).items() if name not in ("command", "run", "debug")}
        return {
            "versions": versions(),
            "settings": settings,
            "device": str(self._qa.device),
            "notes": remarks,
            "documents": self._table.documents,
            "answers": self._answers,
            "pictures": [],
        }

    def _documents(self, question: str | None) -> list[tuple[str, Document]]:
        """The document in the full cache if it is compared with, and compressed; read for a question, or for any."""
        qa, given = self._qa, self._given
        if given.saved:
            documents = [("saved", qa.load(given.documents[0]))]
        else:
            reading: dict[str, Any] = {"query_aware": question is not None, "question": question}
            paths = [str(path) for path in given.documents]
            documents = [("full", qa.read(paths, kv_compression=FULL, **reading))] if self._args.compare else []
            documents.append(("full" if self._args.kv_compression == FULL else "compressed", qa.read(paths, **reading)))
        for name, document in documents:
            self._table.document(name, document.report)
        mark = "" if question is None else f"-question{given.questions.index(question) + 1:02d}"
        self.compressed.append((f"map{mark}.png", documents[-1][1]))
        return documents

    def _answer(self, number: int, question: str, name: str, document: Document) -> None:
        settings: dict[str, Any] = {}
        if self._args.temperature is not None:
            settings = {"do_sample": True, "temperature": self._args.temperature}
        with document.ask(question, stream=True, **settings) as pieces:
            self._table.pieces(document.report, pieces)
            answer: Answer = pieces.answer
        score = self._given.score(question, answer.text)
        self._table.answer(number, answer, score)
        record = {"number": number, "cache": name, **answer.to_dict()}
        self._answers.append(record if score is None else {**record, "score": score})
