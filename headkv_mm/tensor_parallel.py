# SPDX-License-Identifier: Apache-2.0
"""HeadShard: which heads of every layer this process has, where tensor parallelism divides them among processes.

A head's entries never leave its process. What a method decides over all heads of a layer (how they share a budget, the
mean of their scores) is decided from the same numbers in every process, so each keeps what it would keep alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .pieces import Allocation

_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")


@dataclass(frozen=True)
class HeadShard:
    """Heads `rank * n` to `(rank + 1) * n - 1` of every layer, n of them, of `size * n`.

    Attributes:
        rank: of this process among those that share the model.
        size: how many these are; 1 without tensor parallelism.
        group: their process group; None for torch's default group.
        kv_heads: KV heads of a whole layer that the configuration states; None if it states none, or if there is
            nothing to check.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    kv_heads: int | None = None

    @classmethod
    def of(cls, model_or_config: Any) -> HeadShard:
        """What a model's own device mesh says (`from_pretrained(..., tp_plan="auto")`).

        A configuration knows no mesh: then one process is assumed, and `check` finds out if that was wrong.

        Raises:
            ValueError: if the KV heads cannot be divided among the processes.
        """
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return cls()
        stated = _kv_heads(getattr(model_or_config, "config", model_or_config))
        mesh = _mesh_of(model_or_config)
        if mesh is None or mesh.size() == 1 or not _divides_heads(model_or_config):
            return cls(kv_heads=stated)
        if stated is not None and stated % mesh.size():
            raise ValueError(
                f"{stated} KV heads cannot be divided among {mesh.size()} processes; use a number of processes that "
                f"divides {stated}"
            )
        return cls(mesh.get_local_rank(), mesh.size(), mesh.get_group(), stated)

    def check(self, kv_heads: int) -> None:
        """Compare with the KV heads that the keys of a layer really have in this process.

        Raises:
            ValueError: if they are fewer than was assumed.
        """
        if self.kv_heads is not None and kv_heads * self.size < self.kv_heads:
            raise ValueError(
                f"this process has {kv_heads} of the model's {self.kv_heads} KV heads, so the model is divided among "
                "processes, which its configuration does not say: pass the model itself, HeadKVCache(model, ...)"
            )

    def gather(self, numbers: Tensor) -> Tensor:
        """Numbers [B, G, ...] of this process's heads, with those of all others: [B, G * size, ...].

        A third dimension may differ in its size between processes; it is filled up at the front with zeros.
        """
        if self.size == 1:
            return numbers
        wide = numbers.to(torch.uint8) if numbers.dtype == torch.bool else numbers
        if wide.dim() > 2:
            longest = torch.tensor([wide.shape[-1]], device=wide.device)
            torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX, group=self.group)
            wide = torch.nn.functional.pad(wide, (int(longest) - wide.shape[-1], 0))
        wide = wide.contiguous()
        parts = [torch.empty_like(wide) for _ in range(self.size)]
        torch.distributed.all_gather(parts, wide, group=self.group)
        return torch.cat(parts, dim=1).to(numbers.dtype)

    def sum(self, numbers: Tensor) -> Tensor:
        """Numbers of any shape, added up over the processes; nothing waits for the device."""
        if self.size > 1:
            torch.distributed.all_reduce(numbers, group=self.group)
        return numbers

    def own(self, allocation: Allocation, kv_heads: int) -> Allocation:
        """This process's part of an allocation over all heads of a layer.

        Args:
            allocation: targets [B, G * size].
            kv_heads: G.

        Raises:
            ValueError: if it is of this process's heads only: an allocator that knows nothing of the others.
        """
        if self.size == 1:
            return allocation
        if allocation.targets.shape[1] != kv_heads * self.size:
            raise ValueError(
                f"the method's allocator divides the budget among {allocation.targets.shape[1]} heads, and the layer "
                f"has {kv_heads * self.size} in {self.size} processes: use a method that comes with the package, or "
                "let the allocator return targets of all `observed.heads`"
            )
        first = self.rank * kv_heads
        targets = allocation.targets[:, first : first + kv_heads].contiguous()
        return replace(
            allocation,
            targets=targets,
            windows=allocation.windows[:, first : first + kv_heads].contiguous(),
            row_totals=targets.sum(-1).tolist(),
            local=None if allocation.local is None else allocation.local[:, first : first + kv_heads].contiguous(),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadShard:
        """Itself: it never changes, and a process group cannot be copied."""
        return self


def _mesh_of(model: Any) -> Any:
    """The one-dimensional device mesh over which a model's heads are divided, or None."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    names = mesh.mesh_dim_names or ()
    return mesh["tp"] if "tp" in names and mesh.ndim > 1 else mesh


def _divides_heads(model: Any) -> bool:
    """Does the model's plan divide the projections that keys come from?"""
    plan = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None) or {}
    return any(
        name.rsplit(".", 1)[-1] in _KEY_PROJECTIONS and style in ("colwise", "local_colwise", "packed_colwise")
        for name, style in plan.items()
    )


def _kv_heads(config: Any) -> int | None:
    text = config.get_text_config(decoder=True)
    found = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    return found if isinstance(found, int) else None
