# SPDX-License-Identifier: Apache-2.0
"""Tables of the documents about memory plans, which depend on nothing but the code; `update_docs.py` places them."""

from __future__ import annotations

import contextlib
import io

from headkv_mm import cli
from headkv_mm.budgets import parse_budget
from headkv_mm.evaluation.tables import table
from headkv_mm.shapes import get_shape
from headkv_mm.workload import memory_needed

PUBLISHED = [  # shape, images together, method, budget, published factor, published bytes, where
    ("llamagen-xl-384", 128, "headkv", "1/4", "2.36x", "", "arXiv 2605.20600"),
    ("llamagen-xl-384", 128, "headkv", "1/6", "3.00x", "33.91 to 12.34 GB", "arXiv 2605.20600"),
    ("llamagen-xl-384", 256, "lines", "1/4", "5.18x", "", "arXiv 2512.04857"),
    ("llamagen-xl-384", 256, "lines", "1/6", "7.57x", "64.75 to 20.97 GB", "arXiv 2512.04857"),
    ("janus-pro-7b", 55, "headkv", "1/6", "3.68x", "", "arXiv 2605.20600"),
    ("janus-pro-7b", 55, "headkv", "1/8", "3.89x", "", "arXiv 2605.20600"),
    ("janus-pro-7b", 64, "lines", "1/6", "5.62x", "", "arXiv 2512.04857"),
    ("lumina-mgpt-768", 6, "headkv", "1/8", "1.60x", "", "arXiv 2605.20600"),
    ("lumina-mgpt-768", 12, "lines", "1/8", "2.13x", "", "arXiv 2512.04857"),
    ("lumina-mgpt-1024", 8, "lines", "1/8", "2.64x", "", "arXiv 2512.04857"),
]


def published() -> str:
    """Published factors, and the memory that we plan for the same setting."""
    rows = []
    for name, batch, method, budget, factor, gigabytes, source in PUBLISHED:
        work = get_shape(name).workload()
        full, ours = (
            memory_needed(work, chosen, batch=batch, budget=kept).total / 1e9
            for chosen, kept in (("none", None), (method, parse_budget(budget)))
        )
        planned = f"{full:.1f} to {ours:.1f} GB"
        rows.append([name, str(batch), f"`{method}` {budget}", factor, gigabytes, planned, "not run", source])
    heads = ["shape", "images", "method", "published", "published memory", "memory we plan", "ours", "source"]
    return table(heads, rows)


def plan_images() -> str:
    """What `headkv-mm plan` says of an image model."""
    return _plan("--model", "llamagen-xl-384", "--memory", "24GiB", "--batch", "200")


def plan_texts() -> str:
    """What `headkv-mm plan` says of a language model."""
    return _plan("--model", "qwen3-8b", "--memory", "48GiB", "--tokens", "32768", "--chunk", "2048", "--batch", "16")


def plan_glm_image() -> str:
    """What `headkv-mm plan` says where compression saves little."""
    return _plan("--model", "glm-image", "--memory", "24GiB")


def plan_list() -> str:
    """The built-in shapes."""
    return _plan("--list")


def _plan(*words: str) -> str:
    """The command and its output, which depends on nothing but the code."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        cli.main(["plan", *words])
    return f"```bash\nheadkv-mm plan {' '.join(words)}\n```\n\n```text\n{output.getvalue().rstrip()}\n```"
