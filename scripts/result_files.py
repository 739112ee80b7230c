# SPDX-License-Identifier: Apache-2.0
"""The committed results that the documents' tables are made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def load(name: str) -> dict[str, Any]:
    """A committed result, by its path in the results' folder."""
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content
