#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare ways to divide a budget among heads, at equal bytes and with the same first eviction, to choose among them.

Every form is registered as a method of this process, runs through `headkv-mm evaluate`'s own code, and is written with
the methods that it must beat into one results.json and table.md. Finished runs in the folder are not run again.

Captions and documents are those of the seeds below. What looks best on them was chosen on them: a form has to be
confirmed on other seeds before anything is claimed for it.

Example:
    python benchmarks/allocation_forms.py images text --runs build/allocation --output build/allocation/summary
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headkv_mm.allocators import HeadTableShares, MassCurves, Pooled, Proportional, Uniform
from headkv_mm.evaluation.argument_values import budgets, whole
from headkv_mm.evaluation.report import evaluate
from headkv_mm.evaluation.runner import open_model
from headkv_mm.evaluation.settings import EvaluationSettings, budget_label
from headkv_mm.evaluation.storage import read_json, write_json, write_text
from headkv_mm.evaluation.text.report import evaluate_text
from headkv_mm.evaluation.text.runner import open_text_model
from headkv_mm.evaluation.text.settings import TextSettings
from headkv_mm.pieces import Allocator, Scorer
from headkv_mm.registry import Pieces, register_method
from headkv_mm.schedules import AfterGrouping, EachInterval
from headkv_mm.scorers import KeyDifference, QueryLogits, RecentQueries, WindowAttention
from headkv_mm.selectors import Stratified

CAPTIONS_SEED, DOCUMENTS_SEED = 11, 3
BY_SCORE = Stratified(strata_ratio=0.0)
TITLES = {
    "images": "Captions (seed {seed}): images all right, and KL to the full cache's next-token distributions",
    "text": "Documents (seed {seed}): documents right, and values found",
}
NOTE = (
    "This is the half of the material on which forms are chosen: the best of many forms looks better here than it is. "
    "Nothing is claimed from it until the chosen form has run on captions and documents of other seeds."
)


REMARKS = {
    "images": "Every method keeps the same number of entries and evicts first after row 4. Held is every byte at the "
    "end of the image: methods that look at single queries again hold those of the last row too, so at one budget they "
    "hold more; compare them at the bytes held. 1/16 of 256 tokens is less than one row and two tokens, which must "
    "stay.",
    "text": "1,024 tokens, seven tasks, compressed before any question is known. Every method keeps the same number of "
    "entries; methods that look at attention while decoding hold a number more per entry.",
}


def image_forms() -> dict[str, Pieces]:
    """Name -> pieces: eviction as in `headkv` by logits or as in `snapkv` by attention, with budgets of every form."""
    logits, attention = (RecentQueries(), Stratified()), (WindowAttention(pool=1), BY_SCORE)
    largest, spread = (QueryLogits("largest"), BY_SCORE), (QueryLogits("spread"), BY_SCORE)
    pointed = Proportional(scope="model", statistic="pointed", contrast=4.0, most=16.0)
    forms: dict[str, tuple[tuple[Scorer, Stratified], Allocator]] = {
        "logits, all global": (logits, Uniform(window_rows=2.0)),
        "logits, curves model": (logits, MassCurves(scope="model")),
        "logits, pointed contrast 4 model": (logits, pointed),
        "attention, curves model": (attention, MassCurves(scope="model")),
        "attention, pointed contrast 4 model": (attention, pointed),
        "largest logit, uniform": (largest, Uniform()),
        "logit spread, uniform": (spread, Uniform()),
        "attention, curves model again": (attention, MassCurves(scope="model")),
    }
    return {
        name: Pieces(rule[0], form, rule[1], AfterGrouping(regroup_rows=4 if "again" in name else None))
        for name, (rule, form) in forms.items()
    }


def text_forms() -> dict[str, Pieces]:
    """Name -> pieces: entries by their keys (`keydiff`) or by attention (`snapkv`), with budgets of every form."""
    scorers: dict[str, Scorer] = {"keys": KeyDifference(), "attention": WindowAttention(window=8)}
    forms: dict[str, Allocator] = {
        "pooled scores layer": Pooled(window=8),
        "pooled scores model": Pooled(window=8, scope="model"),
        "curves layer": MassCurves(window=8),
        "curves model": MassCurves(window=8, scope="model"),
        "largest loss model": MassCurves(window=8, scope="model", loss="largest"),
        "entropy model": Proportional(window=8, scope="model"),
        "curve length model": Proportional(window=8, scope="model", statistic="curve"),
        "backward model": Proportional(window=8, scope="model", statistic="backward"),
        "distant model": Proportional(window=8, scope="model", statistic="distant"),
        "key spread model": Proportional(window=8, scope="model", statistic="keys"),
    }
    # What was worth a second look after the first.
    distant: dict[str, Allocator] = {
        "distant layer": Proportional(window=8, statistic="distant"),
        "distant floor 0 model": Proportional(window=8, scope="model", statistic="distant", floor=0.0),
        "distant floor 0.5 model": Proportional(window=8, scope="model", statistic="distant", floor=0.5),
        "distant of 64 model": Proportional(window=8, scope="model", statistic="distant", grouping_queries=64),
        "distant of 256 model": Proportional(window=8, scope="model", statistic="distant", grouping_queries=256),
        "distant of 256 floor 0 model": Proportional(
            window=8, scope="model", statistic="distant", grouping_queries=256, floor=0.0
        ),
        "pointed model": Proportional(window=8, scope="model", statistic="pointed"),
        "pointed of 64 up to 16 model": Proportional(
            window=8, scope="model", statistic="pointed", grouping_queries=64, most=16.0
        ),
        "pointed of 64 contrast 4 up to 16 model": Proportional(
            window=8, scope="model", statistic="pointed", grouping_queries=64, most=16.0, contrast=4.0
        ),
        "distant of 64 contrast 4 up to 16 model": Proportional(
            window=8, scope="model", statistic="distant", grouping_queries=64, most=16.0, contrast=4.0
        ),
        "pointed of 64 contrast 4 up to 8 model": Proportional(
            window=8, scope="model", statistic="pointed", grouping_queries=64, most=8.0, contrast=4.0
        ),
        "pointed of 64 contrast 4 model": Proportional(
            window=8, scope="model", statistic="pointed", grouping_queries=64, contrast=4.0
        ),
        "pointed of 64 contrast 8 up to 16 model": Proportional(
            window=8, scope="model", statistic="pointed", grouping_queries=64, most=16.0, contrast=8.0
        ),
        "pointed contrast 4 up to 16 model": Proportional(
            window=8, scope="model", statistic="pointed", most=16.0, contrast=4.0
        ),
        "table": HeadTableShares(window=8),
    }
    best = "pointed of 64 contrast 4 up to 16 model"
    tried = {
        **{(score, form): allocator for score in scorers for form, allocator in forms.items()},
        **{("keys", form): allocator for form, allocator in distant.items()},
        ("attention", best): distant[best],
        ("attention", "table"): distant["table"],
    }
    return {
        f"{score}, {form}": Pieces(scorers[score], allocator, BY_SCORE, EachInterval())
        for (score, form), allocator in tried.items()
    }


def method_name(form: str) -> str:
    """A form's name as it can stand in file names."""
    return form.replace(", ", "+").replace(" ", "-")


def register_forms() -> None:
    """Make methods of the forms; one name may stand for a form for images and one for texts."""
    image, text = image_forms(), text_forms()
    for form in dict.fromkeys((*image, *text)):
        register_method(method_name(form), image=image.get(form), text=text.get(form), description=form)


def summary(run: dict[str, Any], kind: str) -> dict[str, Any]:
    """What results.json holds of a run."""
    found = run["summary"]
    kept = {"method": run["method"], "budget": run["budget"], "bytes_ratio": found["bytes_ratio"]}
    if kind == "text":
        return {**kept, "right": found["exact"], "values": found["partial"]}
    fidelity = found["fidelity"] or {}
    return {**kept, "right": found["outcomes"]["all_right"], "kl": fidelity.get("kl")}


def table(content: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# Ways to divide a budget among heads", "", NOTE, ""]
    for kind in (kind for kind in TITLES if kind in content):
        part = content[kind]
        second = ("values", 100, " %", 1) if kind == "text" else ("kl", 1000, "", 2)
        head = "values found" if kind == "text" else "KL, 1/1000 nats per token"
        lines += [
            f"## {TITLES[kind].format(seed=part['settings']['seed'])}",
            "",
            REMARKS[kind],
            "",
            f"| method | budget | held | right | {head} |",
            "| --- | --- | --- | --- | --- |",
        ]
        for run in part["runs"]:
            other = run.get(second[0])
            lines.append(
                f"| {run['method']} | {'' if run['budget'] is None else budget_label(run['budget'])} "
                f"| {100 * run['bytes_ratio']:.2f} % | {interval(run['right'], 100)} % "
                f"| {'' if other is None else interval(other, second[1], second[3]) + second[2]} |"
            )
        lines.append("")
    return "\n".join(lines)


def interval(found: dict[str, float], factor: float, digits: int = 1) -> str:
    """Mean and 95 % bootstrap interval."""
    mean, low, high = (f"{factor * found[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def run_images(args: argparse.Namespace) -> dict[str, Any]:
    """All forms and the methods beside them on captions."""
    names = map(method_name, image_forms())
    settings = EvaluationSettings(
        methods=("none", "headkv", "lines", "snapkv", "adakv", "keydiff", "streaming", *names),
        budgets=args.image_budgets,
        captions=args.captions,
        seed=CAPTIONS_SEED,
        pictures=0,
    )
    return evaluate(open_model(None, "cpu"), settings, args.runs / "images", progress=False)


def run_text(args: argparse.Namespace) -> dict[str, Any]:
    """All forms and the methods beside them on documents."""
    names = map(method_name, text_forms())
    settings = TextSettings(
        methods=("none", "headkv", "snapkv", "adakv", "keydiff", "headkv-r2", *names),
        budgets=args.text_budgets,
        lengths=(1024,),
        documents=args.documents,
        seed=DOCUMENTS_SEED,
        batch_size=10,
    )
    model, tokenizer = open_text_model(None, "cpu")
    return evaluate_text(model, tokenizer, settings, args.runs / "text", progress=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not finished, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=tuple(TITLES))
    parser.add_argument("--captions", type=whole(1), default=128, metavar="N")
    parser.add_argument("--documents", type=whole(1), default=10, metavar="N", help="of every task")
    parser.add_argument("--image-budgets", type=budgets, default=(1 / 8, 1 / 12), metavar="BUDGETS")
    parser.add_argument("--text-budgets", type=budgets, default=(1 / 4, 1 / 8), metavar="BUDGETS")
    parser.add_argument("--runs", type=Path, required=True, metavar="DIR", help="folder of single runs")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets results.json and table.md")
    args = parser.parse_args(arguments)
    register_forms()
    path = args.output / "results.json"
    content: dict[str, Any] = read_json(path) if path.is_file() else {"format": 1}
    for kind in args.kinds:
        found = (run_images if kind == "images" else run_text)(args)
        runs = [summary(run, kind) for run in found["runs"]]
        content |= {"note": NOTE, kind: {"origin": found["origin"], "settings": found["settings"], "runs": runs}}
        args.output.mkdir(parents=True, exist_ok=True)
        write_json(path, json.loads(json.dumps(content)))
        write_text(args.output / "table.md", table(content))
    print(table(content))


if __name__ == "__main__":
    main()
