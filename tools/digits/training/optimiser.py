"""Muon for the matrices of the blocks, AdamW for everything else; exponential moving average.

Muon: Keller Jordan, 2024, https://kellerjordan.github.io/posts/muon; the update is scaled to
AdamW's usual size by 0.2 * sqrt(max(rows, columns)) (Moonlight, arXiv 2502.16982, section 2.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, from the Muon post."""


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of matrices [..., rows, columns] to about 1, in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; matrices of one shape are treated in one batch."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; closures are not supported."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                self._step_shape(parameters, group["momentum"], scale)

    def _step_shape(self, parameters: Sequence[Tensor], momentum: float, scale: float) -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        buffers = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            buffers.append(state["momentum"])
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        nesterov = torch.stack(torch._foreach_lerp(grads, buffers, momentum))
        updates = orthogonalise(nesterov)
        torch._foreach_add_(list(parameters), list(updates.unbind()), alpha=-scale)


def build_optimisers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon on block matrices, AdamW on the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = name.startswith("blocks.") and parameter.ndim == 2
        (matrices if is_matrix else rest).append(parameter)
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
    return [Muon(matrices, lr=lr), adam]


class Average:
    """Exponential moving average of a model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.source = [parameter.detach() for parameter in model.parameters()]
        self.values = [parameter.clone() for parameter in self.source]

    def update(self, step: int, decay: float) -> None:
        """Move towards the model; early steps average over fewer of them."""
        warm = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, self.source, 1 - warm)

    def state_dict(self) -> dict[str, Tensor]:
        """Averaged weights under the model's names."""
        return dict(zip(self.names, self.values, strict=True))

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Copy averaged weights in."""
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(weights[name])
