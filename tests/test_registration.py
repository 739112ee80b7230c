# SPDX-License-Identifier: Apache-2.0
"""The registrations run once per module of transformers, in any order of imports, and a failure says what failed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from headkv_mm._registration import REGISTRATIONS, Registration, RegistrationError

PARTS = [(part.module, part.function) for part in REGISTRATIONS]

# Stand-ins for our own modules: each writes down that it was asked to register.
STAND_INS = f"""
import importlib.abc, importlib.util, sys
calls, failing = [], []
def call(part):
    calls.append(part)
    if part in failing:
        raise ValueError("no such thing")
class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    parts = dict({PARTS!r})
    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_loader(name, self) if name in self.parts else None
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        part = (module.__name__, self.parts[module.__name__])
        setattr(module, part[1], lambda: call(part))
sys.meta_path.insert(0, StandIns())
"""

ORDERS = {
    "transformers first": "from transformers import pipeline\nimport headkv_mm",
    "headkv_mm first": "import headkv_mm\nfrom transformers import pipeline",
    "headkv_mm first, attribute": "import headkv_mm, transformers\ntransformers.pipelines.pipeline",
    "headkv_mm twice": "import headkv_mm\nimport headkv_mm\nfrom transformers import pipeline\nimport headkv_mm",
}


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("order", ORDERS)
def test_every_registration_runs_once_in_any_order(order: str, tmp_path: Path) -> None:
    check = f"import transformers.modeling_utils\nassert sorted(calls) == sorted({PARTS!r}), calls"
    done = run(f"{STAND_INS}\n{ORDERS[order]}\n{check}", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_unrelated_module_of_transformers_triggers_nothing(tmp_path: Path) -> None:
    done = run(f"{STAND_INS}\nimport headkv_mm\nfrom transformers.utils import logging\nassert not calls", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_failure_names_our_module_and_the_cause(tmp_path: Path) -> None:
    failing = ("headkv_mm.pipelines.registration", "register")
    done = run(f"{STAND_INS}\nfailing.append({failing!r})\n{ORDERS['headkv_mm first']}", tmp_path)
    assert done.returncode != 0
    assert (
        "RegistrationError: headkv_mm could not register itself with transformers.pipelines: "
        "headkv_mm.pipelines.registration.register() raised ValueError: no such thing"
    ) in done.stderr


def test_a_missing_module_is_reported() -> None:
    missing = Registration("transformers.pipelines", "headkv_mm.no_such_module", "register")
    with pytest.raises(RegistrationError, match=r"transformers\.pipelines: importing headkv_mm\.no_such_module"):
        missing.load(sys)


def test_a_missing_function_is_reported() -> None:
    missing = Registration("transformers.pipelines", "sys", "no_such_function")
    with pytest.raises(RegistrationError, match="no_such_function"):
        missing.run(sys)


KNOWN = """
from headkv_mm.llamagen.configuration import LlamaGenConfig
from transformers import AutoConfig, AutoModelForMultimodalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pipelines import PIPELINE_REGISTRY
assert "text-to-image" in PIPELINE_REGISTRY.get_supported_tasks()
assert "headkv" in ALL_ATTENTION_FUNCTIONS and "headkv" in ALL_MASK_ATTENTION_FUNCTIONS
assert type(AutoConfig.for_model(LlamaGenConfig.model_type)) is LlamaGenConfig
assert LlamaGenConfig in AutoModelForMultimodalLM._model_mapping
"""

# Each begins with another module of ours, which brings in transformers' modules while it is half made itself.
OWN_FIRST = {
    "cache": "import headkv_mm\nheadkv_mm.HeadKVCache",
    "attention": "import headkv_mm.attention",
    "pipeline": "import headkv_mm\nheadkv_mm.pipeline",
    "llamagen": "import headkv_mm.llamagen.modeling",
}


@pytest.mark.parametrize("first", [ORDERS["transformers first"], *OWN_FIRST.values()], ids=["transformers", *OWN_FIRST])
def test_transformers_knows_the_parts(first: str, tmp_path: Path) -> None:
    done = run(f"{first}\n{KNOWN}", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_registration_may_run_again() -> None:
    for part in REGISTRATIONS:
        importlib.import_module(part.after)
        ours = importlib.import_module(part.module)
        part.run(ours)
        part.run(ours)
