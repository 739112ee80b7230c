# SPDX-License-Identifier: Apache-2.0
"""Muon, a momentum optimiser whose updates are orthogonalised matrices, in float32 and batched over equal shapes.

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push the singular values of matrices towards 1 by a Newton-Schulz iteration.

    Args:
        matrices: float [N, m, n].
        steps: iterations; five bring the singular values into about 0.7 to 1.2.

    Returns:
        [N, m, n] with the same singular vectors.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: torch.Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Muon for two-dimensional parameters.

    Args:
        params: matrices.
        lr: step size; scaled by sqrt(max(1, rows / columns)) for each matrix.
        momentum: decay of the gradient average; its Nesterov form is used.

    Raises:
        ValueError: if a parameter is not a matrix, or a setting is out of range.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float = 0.02, momentum: float = 0.95) -> None:
        """Sort the parameters by shape; equal shapes are updated in one batch."""
        matrices = list(params)
        if any(item.ndim != 2 for item in matrices):
            raise ValueError("Muon takes matrices only: give other parameters to another optimiser")
        if lr <= 0 or not 0 <= momentum < 1:
            raise ValueError(f"expected lr > 0 and 0 <= momentum < 1, got {lr} and {momentum}")
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters from their gradients."""
        if closure is not None:
            raise ValueError("Muon does not re-evaluate the loss: call step() without a closure")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append((parameter, parameter.grad))
            for shape, pairs in by_shape.items():
                parameters = [parameter for parameter, _ in pairs]
                gradients = torch.stack([gradient for _, gradient in pairs])  # [N, m, n]
                averages = []
                for index, item in enumerate(parameters):
                    average = self.state[item].setdefault("momentum_buffer", torch.zeros_like(item))
                    averages.append(average.lerp_(gradients[index], 1 - group["momentum"]))
                updates = orthogonalise(gradients.lerp(torch.stack(averages), group["momentum"]))
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                torch._foreach_add_(parameters, list(updates), alpha=-rate)
