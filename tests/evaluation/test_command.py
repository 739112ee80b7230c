# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from headkv_mm.evaluation import command
from headkv_mm.evaluation.every_method import methods_meant
from headkv_mm.evaluation.runner import open_model
from headkv_mm.evaluation.settings import EvaluationSettings
from headkv_mm.registry import methods


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["images", "--output", "somewhere", *arguments])


def test_defaults_are_the_published_evaluation() -> None:
    args = parse()
    assert args.methods == ("none", "headkv", "lines", "streaming")
    assert args.budgets == (1 / 4, 1 / 6, 1 / 8)
    assert (args.captions, args.seed, args.first_eviction_rows) == (256, 0, 4)


def test_values_are_read() -> None:
    args = parse(
        "--methods", "headkv, lines", "--budgets", "1/6,64", "--option", "headkv.tau=0.8", "--option", "score=softmax"
    )
    assert args.methods == ("headkv", "lines")
    assert args.budgets == (1 / 6, 64)
    assert args.option == [("headkv", "tau", 0.8), (None, "score", "softmax")]
    assert parse("--option", "share_labels=True", "--option", "grouping_queries=None").option == [
        (None, "share_labels", True),
        (None, "grouping_queries", None),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "2/1"], "outside"),
        (["--budgets", "512MiB"], "depends on the batch"),
        (["--budgets", ","], "no budget is given"),
        (["--methods", ","], "nothing is named"),
        (["--captions", "0"], "at least 1"),
        (["--option", "tau"], "expected NAME=VALUE"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert message in capsys.readouterr().err


def test_the_command_evaluates_a_folder(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.save_pretrained(tmp_path / "model")
    args = parse("--methods", "none", "--captions", "2", "--pictures", "9", "--no-progress", "--json")
    args.model, args.output, args.device = str(tmp_path / "model"), str(tmp_path / "out"), "cpu"
    assert command.run(args) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["method"] for run in printed["runs"]] == ["none"]
    args.json = False
    assert command.run(args) == 0
    assert capsys.readouterr().out.startswith("# Images with a compressed KV cache")


def test_all_means_every_method_for_images(model: Any) -> None:
    meant = methods_meant(parse("--methods", "lines,all").methods, model, "image")
    assert meant == tuple(methods("image"))
    assert EvaluationSettings(methods=meant).compressions()  # all can be told when to evict first
    assert methods_meant(("lines", "lines"), model, "image") == ("lines",)
    with pytest.raises(ValueError, match="fastkv"):
        EvaluationSettings(methods=methods_meant(("all", "fastkv"), model, "image"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        open_model(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="holds a 'llama' model"):
        open_model(str(tmp_path), "cpu")
