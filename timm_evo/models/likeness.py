""" What tells which tokens of a model are alike """
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .beside import is_sharded_weight

__all__ = ['likeness_features']


class _PastHooks(nn.Module):
    """A norm without the hooks on it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.forward(x)


@torch.no_grad()  # positions come of it, which have no gradient
def likeness_features(norm: Any, x: Tensor) -> Tensor:
    """Tokens (B, L, C) as they would leave the last norm of their model (B, L, C).

    Where it has none, as a backbone of `features_only=True`, or one behind the pooling, which pruning takes away: the
    tokens as they are.
    """
    if not is_sharded_weight(getattr(norm, 'weight', None)):
        return norm.forward(x)  # not by a call, which hooks on it would take for that of the final tokens
    # weights are whole only while it is called
    weights = {f'norm.{name}': weight.full_tensor().to(x) for name, weight in norm.named_parameters()}
    return functional_call(_PastHooks(norm), weights, x)
