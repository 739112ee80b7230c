# SPDX-License-Identifier: Apache-2.0
r"""Ask the same questions about many documents, on several processes, each with its own accelerator.

    accelerate launch --num_processes 4 scripts/long_document_qa.py reports/*.pdf --questions-file questions.txt \
        --output answers.jsonl --kv-compression snapkv --kv-budget 1/4

Every document is read and compressed once and answers all questions. One line of JSON per answer, in the order of the
documents. After an interruption the same command goes on where it was; documents that cannot be read are listed in the
end and tried again the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

import headkv_mm
from headkv_mm.commands.option_values import budget, option, whole_number
from headkv_mm.pipelines.defaults import CHUNK_SIZE, DEFAULT_BUDGET, MAX_NEW_TOKENS, METHOD

FULL = "none"
Key = tuple[str, str]  # document and question


def build_parser() -> argparse.ArgumentParser:
    """The arguments of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="+", metavar="DOCUMENT", help=".txt, .md, .html or .pdf files, one by one")
    parser.add_argument("--question", action="append", default=[], metavar="Q", help="repeatable")
    parser.add_argument("--questions-file", type=Path, metavar="FILE", help="text file with one question per line")
    parser.add_argument("--model", help="model folder (default: the embedded language model)")
    parser.add_argument(
        "--kv-compression",
        metavar="METHOD",
        help=f"none: the full cache (default: {METHOD})",
    )
    parser.add_argument("--kv-budget", type=budget, default=DEFAULT_BUDGET, metavar="BUDGET", help="1/4, 256, 64MiB")
    parser.add_argument("--kv-option", type=option, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--chunk-size", type=whole_number(1), default=CHUNK_SIZE, metavar="N")
    parser.add_argument("--max-new-tokens", type=whole_number(1), default=MAX_NEW_TOKENS, metavar="N")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--cpu", action="store_true", help="use no accelerator")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Answer this process's share; the first process puts everybody's answers into one file.

    Returns:
        0, or 1 if a document could not be read.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    questions = _questions(args)
    if not questions:
        parser.error("there is no question: add --question or --questions-file")
    compressed = args.kv_compression != FULL
    settings = {
        "model": args.model,
        "kv_compression": args.kv_compression,
        "kv_budget": args.kv_budget if compressed else None,
        "kv_options": dict(args.kv_option) if compressed else {},
        "max_new_tokens": args.max_new_tokens,
    }
    state = PartialState(cpu=args.cpu)
    done = _answered(args.output, settings)
    wanted = {path: [question for question in questions if (path, question) not in done] for path in args.documents}
    open_documents = [path for path in wanted if wanted[path]]
    state.wait_for_everyone()  # nobody writes before everybody has looked
    qa = headkv_mm.pipeline(
        "long-document-question-answering",
        args.model,
        device=state.device,
        kv_compression=args.kv_compression,
        kv_budget=settings["kv_budget"],
        kv_options=settings["kv_options"],
        max_new_tokens=args.max_new_tokens,
        chunk_size=args.chunk_size,
    )
    failed: list[str] = []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        _part(args.output, state.process_index).open("a", encoding="utf-8") as part,
        state.split_between_processes(open_documents) as share,
    ):
        for path in share:
            try:
                answers = qa.read(path).ask(wanted[path])
            except (ValueError, OSError) as error:
                failed.append(f"{path}: {error}")
                continue
            for answer in answers:
                record = {"document": path, **answer.to_dict(), "settings": settings}
                part.write(json.dumps(record, ensure_ascii=False) + "\n")
            part.flush()
    everybody = sorted(gather_object(failed))
    if state.is_main_process:
        records = _merge(args.output, settings, [(path, item) for path in args.documents for item in questions])
        for line in everybody:
            print(line, file=sys.stderr)
        print(json.dumps({"answers": records, "documents_failed": len(everybody), "output": str(args.output)}))
    state.wait_for_everyone()
    return 1 if everybody else 0


def _questions(args: argparse.Namespace) -> list[str]:
    lines = [] if args.questions_file is None else args.questions_file.read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(text.strip() for text in (*args.question, *lines) if text.strip()))


def _part(output: Path, process: int) -> Path:
    """Where a process writes until all are done."""
    return output.with_name(f"{output.name}.part-{process}")


def _files(output: Path) -> list[Path]:
    return [path for path in (output, *sorted(output.parent.glob(f"{output.name}.part-*"))) if path.is_file()]


def _answered(output: Path, settings: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """The answers of earlier runs, finished or not.

    Raises:
        ValueError: if they were made with other settings, or a file holds something else.
    """
    found: dict[Key, dict[str, Any]] = {}
    for path in _files(output):
        for record in _records(path):
            if record.get("settings") != settings:
                raise ValueError(f"{path} holds answers with other settings: choose another --output, or remove it")
            found[record["document"], record["question"]] = record
    return found


def _records(path: Path) -> Iterable[dict[str, Any]]:
    """The lines of a file; a last line that was cut when its process ended is taken out of the file."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    for number, line in enumerate(whole.decode("utf-8").splitlines(), 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            raise ValueError(f"{path}, line {number}, is no JSON: choose another --output") from None


def _merge(output: Path, settings: dict[str, Any], order: list[Key]) -> int:
    """Put all answers into one file, those of this command first and in its order; returns how many there are."""
    found = _answered(output, settings)
    keys = [key for key in dict.fromkeys(order) if key in found]
    keys += [key for key in found if key not in set(keys)]
    staged = output.with_name(f".{output.name}.tmp")
    with staged.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(found[key], ensure_ascii=False) + "\n" for key in keys)
    os.replace(staged, output)
    for path in _files(output)[1:]:
        path.unlink()
    return len(keys)


if __name__ == "__main__":
    sys.exit(main())
