# SPDX-License-Identifier: Apache-2.0
"""Tables of the documents that compare all methods; `update_docs.py` puts them in place."""

from __future__ import annotations

from result_files import load

from headkv_mm.compiled_tables import SHIPPED_NAME as COMPILED_NAME
from headkv_mm.compiled_tables import load_compiled_tables
from headkv_mm.demo import text_model_path
from headkv_mm.evaluation.settings import FULL, budget_label
from headkv_mm.evaluation.tables import interval, percent, table
from headkv_mm.head_tables import SHIPPED, load_head_table
from headkv_mm.layer_tables import SHIPPED_NAME, load_layer_table

SEGMENT_SCORERS = ("keydiff", "r-kv", "expected-attention", "tova")


def method_rows() -> str:
    """Every method's measured row: quality of texts and images, CPU time, bytes."""
    texts = {
        (folder, run["method"], run["budget"]): percent(run["summary"]["exact"]["mean"], 0)
        for folder in ("text", "text_query_aware")
        for run in load(f"{folder}/results.json")["runs"]
    }
    images = {
        (run["method"], budget_label(run["budget"])): percent(run["summary"]["outcomes"]["all_right"]["mean"], 0)
        for folder in ("images_methods", "images")  # of two runs of a method, the one on more captions
        for run in load(f"{folder}/results.json")["runs"]
        if run["method"] != FULL
    }
    times = {run["method"]: run for run in load("cpu/method_times.json")["results"]}
    names = list(dict.fromkeys([*(name for _, name, _ in texts), *(name for name, _ in images)]))
    columns = [(folder, budget) for folder in ("text", "text_query_aware") for budget in (1 / 4, 1 / 8)]
    rows = []
    for name in names:
        full = name == FULL
        answered = [texts.get((folder, name, None if full else budget), "") for folder, budget in columns]
        drawn = [images.get((name, label), "") for label in ("1/6", "1/8")]
        cost = times.get(name)
        costs = [
            "" if cost is None else percent(cost["prefill_ratio"], 0),
            "" if cost is None else percent(cost["decode_ratio"], 0),
            "" if cost is None else percent(cost["nbytes"] / cost["nbytes_full"]),
        ]
        if full:
            best = load("images/results.json")["runs"][0]["summary"]["outcomes"]["all_right"]["mean"]
            drawn, costs = [percent(best, 0)] * 2, [percent(1.0, 0), percent(1.0, 0), percent(1.0)]
        rows.append(["full cache" if full else f"`{name}`", *answered, *drawn, *costs])
    heads = ["method", "before, 1/4", "before, 1/8", "after, 1/4", "after, 1/8", "image, 1/6", "image, 1/8"]
    return table([*heads, "prefill", "decode", "bytes"], rows)


def images() -> str:
    """The short table of the image evaluation: bytes and quality."""
    content = load("images/results.json")
    rows = []
    for run in content["runs"]:
        summary = run["summary"]
        full = run["method"] == FULL
        rows.append(
            [
                "full cache" if full else f"`{run['method']}`",
                "" if full else budget_label(run["budget"]),
                percent(summary["bytes_ratio"]),
                interval(summary["outcomes"]["all_right"]),
                "" if full else interval(summary["difference_to_full"]["all_right"], sign=True),
            ]
        )
    return table(["method", "budget", "bytes held", "images all right", "difference to full"], rows)


def images_methods() -> str:
    """Methods that were made for texts, or for both, on images."""
    content = load("images_methods/results.json")
    rows = []
    for run in content["runs"]:
        summary, full = run["summary"], run["method"] == FULL
        rows.append(
            [
                "full cache" if full else f"`{run['method']}`",
                "" if full else budget_label(run["budget"]),
                percent(summary["bytes_ratio"]),
                interval(summary["outcomes"]["all_right"]),
                "" if full else percent(summary["fidelity"]["agreement"]["mean"], 2),
            ]
        )
    heads = ["method", "budget", "bytes held", f"{content['settings']['captions']} images all right", "agreement"]
    return table(heads, rows)


def segments() -> str:
    """A scorer with plain eviction, and with a quota for every segment."""
    rows = []
    for scorer in SEGMENT_SCORERS:
        runs = load(f"text_segments/{scorer}/results.json")["runs"]
        found = {(run["method"], run["budget"]): run["summary"] for run in runs}
        for budget in dict.fromkeys(run["budget"] for run in runs if run["method"] == "ams"):
            plain, ours = found[scorer, budget], found["ams", budget]
            rows.append(
                [
                    f"`{scorer}`",
                    budget_label(budget),
                    interval(plain["partial"]),
                    interval(ours["partial"]),
                    f"{100 * (ours['partial']['mean'] - plain['partial']['mean']):+.1f} points",
                    f"{percent(plain['bytes_ratio'])}, {percent(ours['bytes_ratio'])}",
                ]
            )
    return table(["scorer", "budget", "plain", "with segments", "difference", "bytes held"], rows)


def layer_errors() -> str:
    """The layer table of the embedded language model."""
    shipped = load_layer_table(text_model_path() / SHIPPED_NAME)
    total = sum(shipped.errors)
    rows = [[str(layer), f"{error:.3f}", percent(error / total)] for layer, error in enumerate(shipped.errors)]
    return table(["layer", "error", "share"], rows)


def head_table() -> str:
    """The head table of the embedded language model, by layer."""
    shipped = load_head_table(text_model_path() / SHIPPED["r2"])
    rows = [
        [str(layer), percent(sum(scores)), *(percent(score) for score in scores)]
        for layer, scores in enumerate(shipped.kv_scores().tolist())
    ]
    names = [f"KV head {head}" for head in range(shipped.kv_heads)]
    said = f"{shipped.answered} of {shipped.examples} prompts were answered right. Shares of all scores:"
    return f"{said}\n\n{table(['layer', 'all its heads', *names], rows)}"


def compiled_tables() -> str:
    """What the embedded language model's compiled tables lose and hold on texts kept apart."""
    shipped = load_compiled_tables(text_model_path() / COMPILED_NAME)
    rows = [
        [
            budget_label(means["budget"]),
            *(f"{means[name]:.3f}" for name in ("full", "identity", "compiled")),
            percent(means["held"]),
        ]
        for means in shipped.validation
    ]
    return table(["budget", "full cache", "identity tables", "compiled tables", "entries held of the budget"], rows)
