""" What tells which tokens of a model are alike """
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..method.similarity import LayerNorm
from .beside import is_sharded_weight

__all__ = ['NormedLikeness']


class _PastHooks(nn.Module):
    """A norm without the hooks on it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.forward(x)


class NormedLikeness:
    """Tokens are alike that would leave the last norm of their model alike.

    Where it has none, as a backbone of `features_only=True`, or one behind the pooling, which pruning takes away: the
    tokens as they are.
    """

    def __init__(self, norm: Any) -> None:
        self._norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        return likeness_features(self._norm, x)

    def as_layer_norm(self) -> LayerNorm | None:
        norm = self._norm
        # exactly these, as a class of somebody's own may compute anything
        if type(norm) not in (nn.LayerNorm, timm.layers.LayerNorm) or 'forward' in norm.__dict__ or (
                is_sharded_weight(norm.weight)):
            return None
        weight = None if norm.weight is None else norm.weight.detach()  # positions come of it, which have no gradient
        bias = None if norm.bias is None else norm.bias.detach()
        return LayerNorm(weight, bias, norm.eps)


@torch.no_grad()  # positions come of it, which have no gradient
def likeness_features(norm: Any, x: Tensor) -> Tensor:
    """Tokens (B, L, C) as they would leave a norm (B, L, C)."""
    if not is_sharded_weight(getattr(norm, 'weight', None)):
        return norm.forward(x)  # not by a call, which hooks on it would take for that of the final tokens
    # weights are whole only while it is called
    weights = {f'norm.{name}': weight.full_tensor().to(x) for name, weight in norm.named_parameters()}
    return functional_call(_PastHooks(norm), weights, x)
