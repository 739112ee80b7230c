#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare ways to divide a budget among heads, at equal entries and with the same first eviction, to choose one.

Every form of `allocation_catalogue.py` is registered as a method of this process, runs through `headkv-mm evaluate`'s
own code, and is written into one results.json and table.md. Finished runs in the folder are not run again, so after an
interruption the same command goes on. On a machine with two cores that do nothing else images take about half an hour,
texts about a quarter.

Captions and documents are those of the seeds below. What looks best on them was chosen on them: it is confirmed, or
not, by `allocation_held_out.py`.

Example:
    python benchmarks/allocation_forms.py images text --runs build/allocation --output build/allocation/summary
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allocation_catalogue import Form, Table, image_forms, register_forms, text_forms
from allocation_held_out_table import MEASURES, interval

from headkv_mm.evaluation.argument_values import budgets, names, whole
from headkv_mm.evaluation.report import evaluate
from headkv_mm.evaluation.runner import open_model
from headkv_mm.evaluation.settings import FULL, EvaluationSettings, budget_label
from headkv_mm.evaluation.storage import read_json, write_json, write_text
from headkv_mm.evaluation.tables import percent
from headkv_mm.evaluation.tables import table as markdown
from headkv_mm.evaluation.text.report import evaluate_text
from headkv_mm.evaluation.text.runner import open_text_model
from headkv_mm.evaluation.text.settings import TextSettings
from headkv_mm.fingerprint import fingerprint

CAPTIONS_SEED, DOCUMENTS_SEED = 11, 3
NEEDS = Path(__file__).resolve().parent / "results" / "heads_images" / "results.json"
TITLES = {
    "images": "Captions (seed {seed}): images all right, and KL to the full cache's next-token distributions",
    "text": "Documents (seed {seed}): documents right, and values found",
}
NOTE = (
    "This is the half of the material on which forms are chosen: the best of many forms looks better here than it is. "
    "Nothing is claimed from it until the chosen form has run on captions and documents of other seeds."
)
REMARKS = {
    "images": "Every form keeps the same number of entries and evicts first after row 4. Held is every byte at the end "
    "of the image: forms that look at single queries once more hold those of the last row too. The table of needs was "
    "measured on the same captions, which favours it here.",
    "text": "1,024 tokens, seven tasks, compressed before any question is known. Every form keeps the same number of "
    "entries; those that look at attention while decoding hold a number more per entry.",
}


def summary(run: Mapping[str, Any], form: Form | None) -> dict[str, Any]:
    """What results.json holds of a run."""
    found = run["summary"]
    kept = {
        "method": run["method"],
        "entries": "" if form is None else form.entries,
        "division": "" if form is None else form.division,
        "budget": run["budget"],
        "bytes_ratio": found["bytes_ratio"],
    }
    if "exact" in found:
        return {**kept, "right": found["exact"], "values": found["partial"]}
    fidelity = found["fidelity"] or {}
    return {**kept, "right": found["outcomes"]["all_right"], "kl": fidelity.get("kl")}


def table(content: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    parts = ["# Ways to divide a budget among heads", NOTE]
    for kind in (kind for kind in TITLES if kind in content):
        part = content[kind]
        second = "kl" if kind == "images" else "values"
        heads = ["entries kept for", "division", "method", "budget", "held", "right", MEASURES[second][0]]
        rows = [
            [
                "full cache" if run["method"] == FULL else run["entries"],
                run["division"],
                "" if run["method"] == FULL else f"`{run['method']}`",
                "" if run["budget"] is None else budget_label(run["budget"]),
                percent(run["bytes_ratio"], 2),
                interval(run["right"], "right"),
                interval(run[second], second),
            ]
            for run in part["runs"]
        ]
        parts += [f"## {TITLES[kind].format(seed=part['settings']['seed'])}", REMARKS[kind], markdown(heads, rows)]
    return "\n\n".join(parts) + "\n"


def run_images(args: argparse.Namespace, methods: Sequence[str], model: Any) -> dict[str, Any]:
    """Forms on captions."""
    settings = EvaluationSettings(
        methods=(FULL, *methods),
        budgets=args.image_budgets,
        captions=args.captions,
        seed=CAPTIONS_SEED,
        pictures=0,
    )
    return evaluate(model, settings, args.runs / "images", progress=args.progress)


def run_text(args: argparse.Namespace, methods: Sequence[str]) -> dict[str, Any]:
    """Forms on documents."""
    settings = TextSettings(
        methods=(FULL, *methods),
        budgets=args.text_budgets,
        lengths=(args.length,),
        documents=args.documents,
        seed=DOCUMENTS_SEED,
        batch_size=10,
    )
    model, tokenizer = open_text_model(args.model, "cpu")
    return evaluate_text(model, tokenizer, settings, args.runs / "text", progress=args.progress)


def needs_of(path: Path, model: Any) -> Table:
    """Entries that every head turned out to need, by layer and KV head, as `headkv-mm evaluate heads` measured them.

    Raises:
        ValueError: if they are of another model.
    """
    content = read_json(path)
    if content["settings"]["model"] != fingerprint(model):
        raise ValueError(f"{path} was measured on another model; measure this one, or leave it out with --needs ''")
    late: Table = content["needs"]["late"]
    return late


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not finished, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=tuple(TITLES))
    parser.add_argument("--captions", type=whole(1), default=128, metavar="N")
    parser.add_argument("--documents", type=whole(1), default=10, metavar="N", help="of every task")
    parser.add_argument("--length", type=whole(1), default=1024, metavar="TOKENS", help="of a document")
    parser.add_argument(
        "--image-budgets", type=budgets, default=(1 / 4, 1 / 6, 1 / 8, 1 / 10, 1 / 12), metavar="BUDGETS"
    )
    parser.add_argument("--text-budgets", type=budgets, default=(1 / 2, 1 / 4, 1 / 8, 1 / 16), metavar="BUDGETS")
    parser.add_argument("--only", type=names, metavar="METHODS", help="of the forms, separated by commas")
    parser.add_argument(
        "--needs", default=str(NEEDS), metavar="FILE", help="results.json of evaluate heads; '' for none"
    )
    parser.add_argument("--model", metavar="FOLDER", help="default: the embedded model")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="folder of single runs")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets results.json and table.md")
    parser.add_argument("--progress", action="store_true", help="draw bars on stderr")
    args = parser.parse_args(arguments)
    image_model = open_model(args.model, "cpu") if "images" in args.kinds else None
    needs = needs_of(Path(args.needs), image_model) if args.needs and image_model is not None else None
    forms = {"images": image_forms(needs), "text": text_forms()}
    register_forms(forms["images"], forms["text"])
    path = args.output / "results.json"
    content: dict[str, Any] = read_json(path) if path.is_file() else {"format": 2}
    for kind in args.kinds:
        by_method = {form.method: form for form in forms[kind] if args.only is None or form.method in args.only}
        if not by_method:
            parser.error(
                f"--only names no form for {kind}; there are: {', '.join(form.method for form in forms[kind])}"
            )
        found = (
            run_images(args, tuple(by_method), image_model) if kind == "images" else run_text(args, tuple(by_method))
        )
        runs = [
            summary(run, by_method.get(run["method"]))
            for run in found["runs"]
            if run["method"] == FULL or run["method"] in by_method
        ]
        content |= {
            "format": 2,
            "note": NOTE,
            kind: {"origin": found["origin"], "settings": found["settings"], "runs": runs},
        }
        write_json(path, content)
        content = read_json(path)
        write_text(args.output / "table.md", table(content))
    print(table(content))


if __name__ == "__main__":
    main()
