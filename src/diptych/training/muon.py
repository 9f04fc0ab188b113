"""Train by Muon: steps whose matrices turn all directions equally far (Jordan et al. 2024).

The momentum of each matrix is brought to the nearest one of singular values near 1 by a
Newton-Schulz iteration. Scaled so that a step is as large as AdamW's (Liu et al. 2025, "Muon is
scalable for LLM training", section 2.2), it takes the same learning rate. Biases, norms and
embeddings go by Adam.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diptych.training.parallel import Workers

__all__ = ["Muon", "orthogonalized"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_AS_ADAMW = 0.2  # the root mean square of AdamW's steps
_BETAS, _EPS = (0.9, 0.99), 1e-8
_NARROW = 16  # a matrix of fewer rows or columns gains nothing


class Muon(torch.optim.Optimizer):
    """Step matrices and kernels by Muon, all else by Adam; both with weight decay of matrices.

    With several `workers` each turns its share of the matrices; gradients are averaged already.
    Names that contain one of `plain` go by Adam as well: layers next to inputs and outputs.
    With `lr` in a tensor a step asks the device for nothing, and a CUDA graph can record it.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        lr: float | Tensor,
        *,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        plain: tuple[str, ...] = ("conv_in", "conv_out", "embedding"),
        workers: Workers | None = None,
    ) -> None:
        groups: dict[str, list[nn.Parameter]] = {"turned": [], "plain": []}
        for name, parameter in named:
            is_matrix = parameter.ndim > 1 and min(_as_matrix(parameter).shape) >= _NARROW
            turned = is_matrix and not any(each in name for each in plain)
            groups["turned" if turned else "plain"].append(parameter)
        super().__init__(
            [
                {"params": groups["turned"], "weight_decay": weight_decay, "turned": True},
                {"params": groups["plain"], "weight_decay": 0.0, "turned": False},
            ],
            {"lr": lr, "momentum": momentum},
        )
        self._workers = workers or Workers.alone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._turn if group["turned"] else self._adam)(group, parameters)

    def _turn(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momentum = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_lerp_(momentum, gradients, 1 - group["momentum"])
        lookahead = torch._foreach_lerp(gradients, momentum, group["momentum"])
        sizes = [min(_as_matrix(p).shape) ** 2 * max(_as_matrix(p).shape) for p in parameters]
        mine = self._workers.lightest_share(sizes)
        steps = [
            each if index in mine else torch.zeros_like(each)
            for index, each in enumerate(lookahead)
        ]
        for alike in _by_shape(lookahead, mine):
            turned = orthogonalized(torch.stack([_as_matrix(lookahead[i]) for i in alike]))
            for index, matrix in zip(alike, turned, strict=True):
                steps[index] = matrix.reshape_as(lookahead[index])
        self._workers.add_up(steps)
        scales = [_AS_ADAMW * max(_as_matrix(p).shape) ** 0.5 for p in parameters]
        torch._foreach_mul_(steps, scales)
        torch._foreach_mul_(steps, -group["lr"])
        torch._foreach_mul_([*parameters], 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_([*parameters], steps)

    def _adam(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if "exp_avg" not in self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        for parameter in parameters:  # a state that was read from a file may lie elsewhere
            self.state[parameter]["step"] = self.state[parameter]["step"].to(parameter.device)
        states = [self.state[parameter] for parameter in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        first, second = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(first, gradients, 1 - _BETAS[0])
        torch._foreach_mul_(second, _BETAS[1])
        torch._foreach_addcmul_(second, gradients, gradients, 1 - _BETAS[1])
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        # What is missing of averages that began at zero.
        shorter = [torch._foreach_pow(beta, steps) for beta in _BETAS]
        for short in shorter:
            torch._foreach_neg_(short)
            torch._foreach_add_(short, 1)
        spread = torch._foreach_div(second, shorter[1])
        spread = torch._foreach_sqrt(spread)
        torch._foreach_add_(spread, _EPS)
        moves = torch._foreach_div(first, spread)
        torch._foreach_div_(moves, shorter[0])
        torch._foreach_mul_(moves, -group["lr"])
        torch._foreach_add_([*parameters], moves)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return matrices with the singular vectors of `matrices` [B, m, n] and values of about 1."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if is_tall else matrices
    wide = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    rows, columns = wide.shape[1:]
    if columns < 2 * rows:
        for _ in range(_ITERATIONS):
            gram = wide @ wide.mT
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            wide = torch.baddbmm(wide, factor, wide, beta=a)
        return wide.mT if is_tall else wide
    # Every factor is a polynomial in the Gram matrix, which is small: multiply the factors first.
    gram = wide @ wide.mT
    identity = torch.eye(rows, device=wide.device, dtype=wide.dtype)
    product = identity
    for index in range(_ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * identity
        product = factor @ product if index else factor
        if index < _ITERATIONS - 1:
            gram = factor @ gram @ factor
    turned: Tensor = product @ wide
    return turned.mT if is_tall else turned


def _by_shape(tensors: Sequence[Tensor], mine: set[int]) -> list[list[int]]:
    """Return the indices `mine` in groups of one matrix shape: many small products are slow."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(mine):
        groups.setdefault(tuple(_as_matrix(tensors[index]).shape), []).append(index)
    return list(groups.values())


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], -1)
