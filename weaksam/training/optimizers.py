"""Muon for the matrices inside a network and AdamW for the rest, as one optimiser.

Muon replaces the momentum of a matrix by the nearest orthogonal matrix, so that all directions are learnt at the same
rate; a transformer trained from scratch on little data needs far fewer steps with it. https://kellerjordan.github.io/posts/muon
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weaksam.ops.precision import computes_bf16

_COEFFICIENTS, _ROUNDS = (3.4445, -4.775, 2.0315), 5  # the published quintic: singular values end in 0.7 to 1.2
_MOMENTUM = 0.95
_LIKE_ADAMW = 0.2  # root mean square of an update of AdamW, arXiv 2502.16982


def orthogonalise(matrix: Tensor) -> Tensor:
    """Approximates the nearest orthogonal matrix of a matrix (A, B) by Newton-Schulz iteration.

    In bf16, as is usual, but in fp32 on CPUs that emulate bf16.
    """
    x = matrix.to(torch.bfloat16 if computes_bf16(matrix.device) else torch.float32)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for matrices; updates have the size of AdamW's, so that both can share a learning rate.

    The same steps as `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, which has no choice of precision: it
    iterates in bf16 on every device.
    """

    def __init__(self, matrices: list[Any], *, lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Performs one step."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                momentum = state.setdefault("momentum_buffer", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - _MOMENTUM)
                if not group["lr"]:  # outside its window of steps
                    continue
                update = orthogonalise(matrix.grad.lerp(momentum, _MOMENTUM))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * _LIKE_ADAMW * math.sqrt(max(matrix.shape)))


class MuonAdamW(torch.optim.Optimizer):
    """Two optimisers with the interface of one."""

    def __init__(self, matrices: list[Any], others: list[Any], *, lr: float, weight_decay: float) -> None:
        """Takes each parameter once. `matrices` are 2-D and have weight decay, `others` have none; both use `lr`.

        Both are parameters or parameter groups, as for torch's optimisers.
        """
        self.parts = (
            Muon(matrices, lr=lr, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.98)),
        )
        super().__init__([*matrices, *others], {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Performs one step of both."""
        for part in self.parts:
            part.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Returns both states."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads both states and keeps the parameter groups that the schedule uses."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
