# SPDX-License-Identifier: Apache-2.0
"""The registrations run once per module of transformers, in either import order, and a failure says what failed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from headkv_mm import _registration
from headkv_mm._registration import REGISTRATIONS, Registration

# Stand-ins for our own modules: each writes down that it was asked to register.
STAND_INS = """
import sys, types
calls = []
def stand_in(name, function):
    module = sys.modules.setdefault(name, types.ModuleType(name))
    setattr(module, function, lambda: calls.append((name, function)))
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
def test_every_registration_runs_once_in_either_order(order: str, tmp_path: Path) -> None:
    parts = [(part.module, part.function) for part in REGISTRATIONS]
    code = "\n".join(
        [
            STAND_INS,
            *(f"stand_in({module!r}, {function!r})" for module, function in parts),
            ORDERS[order],
            "import transformers.modeling_utils",
            f"assert sorted(calls) == sorted({parts!r}), calls",
        ]
    )
    done = run(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("order", ["transformers first", "headkv_mm first"])
def test_transformers_knows_the_task_and_the_attention_name(order: str, tmp_path: Path) -> None:
    code = f"""
{ORDERS[order]}
from transformers import AutoConfig, AutoModelForMultimodalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pipelines import PIPELINE_REGISTRY
assert "text-to-image" in PIPELINE_REGISTRY.get_supported_tasks()
assert "headkv" in ALL_ATTENTION_FUNCTIONS and "headkv" in ALL_MASK_ATTENTION_FUNCTIONS
from headkv_mm.llamagen.configuration import LlamaGenConfig
assert type(AutoConfig.for_model(LlamaGenConfig.model_type)) is LlamaGenConfig
assert LlamaGenConfig in AutoModelForMultimodalLM._model_mapping
"""
    done = run(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_registration_names_a_function_that_exists_and_may_run_again() -> None:
    for part in REGISTRATIONS:
        loaded = importlib.import_module(part.after)
        part(loaded)
        part(loaded)


def test_a_failure_names_our_module_and_the_cause(tmp_path: Path) -> None:
    code = f"""
{STAND_INS}
def fail():
    raise ValueError("no such thing")
for part in {[(part.module, part.function) for part in REGISTRATIONS]!r}:
    stand_in(*part)
sys.modules["headkv_mm.pipelines.registration"].register = fail
{ORDERS["headkv_mm first"]}
"""
    done = run(code, tmp_path)
    assert done.returncode != 0
    assert "headkv_mm.pipelines.registration.register() raised ValueError: no such thing" in done.stderr
    assert "ImportError: headkv_mm could not register itself with transformers.pipelines" in done.stderr


def test_a_missing_module_is_reported() -> None:
    missing = Registration("transformers.pipelines", "headkv_mm.no_such_module", "register")
    with pytest.raises(ImportError, match=r"headkv_mm\.no_such_module"):
        missing(_registration)


def test_an_unrelated_module_of_transformers_triggers_nothing(tmp_path: Path) -> None:
    code = f"""
{STAND_INS}
for part in {[(part.module, part.function) for part in REGISTRATIONS]!r}:
    stand_in(*part)
import headkv_mm, transformers
from transformers.utils import logging
assert calls == [], calls
"""
    done = run(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
