# SPDX-License-Identifier: Apache-2.0
"""One rank of the tensor parallel test; torchrun starts it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from tensor_parallel_cases import generate_all, load_models

import headkv_mm
from headkv_mm.allocators import Uniform
from headkv_mm.pieces import Allocation, Observed


@dataclass(frozen=True)
class Unaware(Uniform):
    """Divides the budget among the heads that it sees, as if there were no others."""

    def allocate(self, observed: Observed, scores: torch.Tensor) -> Allocation:
        whole = super().allocate(observed, scores)
        targets = whole.targets[:, : observed.store.kv_heads]
        return Allocation(targets, targets, targets.sum(-1).tolist(), whole.largest)


def refused(text: torch.nn.Module, cache: headkv_mm.HeadKVCache) -> str:
    """The message with which a forward is refused."""
    with torch.no_grad():
        try:
            text(torch.arange(5, 55)[None], past_key_values=cache)
        except ValueError as error:
            return str(error)
    return ""


def main(folder: Path) -> None:
    """Generate everything and write what this rank saw."""
    text, image = load_models(folder, tp_plan="auto")
    assert text.tp_size == image._tp_size == 2
    found = generate_all(folder, text, image)
    cache = headkv_mm.HeadKVCache(text, "snapkv", budget=20)
    found["refused"] = {
        "configuration": refused(text, headkv_mm.HeadKVCache(text.config, "snapkv", budget=20)),
        "allocator": refused(text, headkv_mm.HeadKVCache(text, "snapkv", budget=20, allocator=Unaware())),
        "second": refused(text, cache),
    }
    try:
        cache.save(folder / "cache.safetensors", text)
    except ValueError as error:
        found["refused"]["save"] = str(error)
    text.config.num_key_value_heads = 3
    try:
        headkv_mm.HeadKVCache(text, "snapkv", budget=20)
    except ValueError as error:
        found["refused"]["uneven"] = str(error)
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
