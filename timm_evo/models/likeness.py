""" Features by which tokens of a model are compared """
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..method.similarity import LayerNorm
from .beside import is_sharded_weight

__all__ = ['NormedLikeness']


class _PastHooks(nn.Module):
    """Calls a norm without its hooks."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.forward(x)


class NormedLikeness:
    """Compares tokens by the output of the last norm of the model.

    If the norm is an `nn.Identity`, the tokens are compared as they are. This is the case in a backbone of
    `features_only=True`, and in a model with a norm after the pooling.
    """

    def __init__(self, norm: Any) -> None:
        self._norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        return likeness_features(self._norm, x)

    def as_layer_norm(self) -> LayerNorm | None:
        norm = self._norm
        # no subclasses, because they may compute anything
        if type(norm) not in (nn.LayerNorm, timm.layers.LayerNorm) or 'forward' in norm.__dict__ or (
                is_sharded_weight(norm.weight)):
            return None
        weight = None if norm.weight is None else norm.weight.detach()  # positions have no gradient
        bias = None if norm.bias is None else norm.bias.detach()
        return LayerNorm(weight, bias, norm.eps)


@torch.no_grad()  # the result is used for positions, which have no gradient
def likeness_features(norm: Any, x: Tensor) -> Tensor:
    """Output of a norm (B, L, C) for tokens (B, L, C), without its hooks."""
    if not is_sharded_weight(getattr(norm, 'weight', None)):
        return norm.forward(x)  # not a call, because hooks on the norm expect the final tokens
    # sharded weights are complete only during a call
    weights = {f'norm.{name}': weight.full_tensor().to(x) for name, weight in norm.named_parameters()}
    return functional_call(_PastHooks(norm), weights, x)
