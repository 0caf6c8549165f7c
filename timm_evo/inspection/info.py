""" Summary of a registered model as text """
import itertools
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from torch import nn

from ..models.base import EvolvedModel, find_evolved, input_size
from ..models.registry import is_evolved
from .building import build_without_weights, check_name
from .cost import count_gmacs

__all__ = ['summarise']


def summarise(name: str, **kwargs: Any) -> str:
    """Settings, cost, tokens of each block and origin of the weights of an evolved model. No weights are created.

    Args:
        name: Name of a registered `evo_*` model.
        **kwargs: Arguments of `timm.create_model`.

    Raises:
        ValueError: There is no such model, or it does not work with these arguments.
    """
    check_name(name)
    if not is_evolved(name):
        twin = f' Use evo_{name}.' if is_evolved(f'evo_{name}') else ''
        raise ValueError(f'{name} is not an evolved model.{twin}')
    model = build_without_weights(name, kwargs)
    _, evolved = find_evolved(model)  # with features_only=True it is inside the model
    assert evolved is not None
    dense_kwargs = {key: value for key, value in kwargs.items() if key not in evolved.ARGUMENTS}
    with torch.device('meta'):
        # the images of an evo_* name may be larger than those of the dense name of the same architecture
        img_size = getattr(getattr(evolved, 'patch_embed', None), 'img_size', None)
        size = {} if img_size is None else {'img_size': img_size}
        dense = timm.create_model(evolved.dense_architecture, **{**size, **dense_kwargs}).eval()
        image = next(model.parameters()).new_zeros(1, *input_size(evolved))
        gmacs, dense_gmacs = count_gmacs(model, image), count_gmacs(dense, image)
        tokens = _count_tokens(model, evolved, image)
    weights = [
        f'{cfg.hf_hub_id or cfg.url}, as {key}'
        for key, cfg in get_arch_pretrained_cfgs(name.partition('.')[0]).items() if cfg.has_weights
    ]
    lines = [
        f"{name}: timm's {evolved.dense_architecture} with token evolution",
        f'  images      {" x ".join(map(str, image.shape[1:]))}',
        f'  parameters  {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M',
        f'  GMACs       {gmacs:.2f}, dense {dense_gmacs:.2f} ({gmacs / dense_gmacs:.0%})',
        f'  evolution   {evolved.extra_repr()}',
        '  weights     ' + ('\n' + 14 * ' ').join(weights or ['none: train the model, or convert a checkpoint']),
        '  blocks      tokens, prefix and representative tokens included',
    ]
    for number, run in itertools.groupby(enumerate(tokens), key=lambda pair: pair[1]):
        blocks = [i for i, _ in run]
        lines.append(f'  {f"{blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else blocks[0]!s:<10}  {number}')
    return '\n'.join(lines)


def _count_tokens(model: nn.Module, evolved: EvolvedModel, image: torch.Tensor) -> list[int]:
    """Number of tokens that enter each block of `evolved`, which is `model` or is inside it."""
    numbers: list[int] = []
    stages = [evolved] if hasattr(evolved, 'blocks') else evolved.stages
    blocks = [block for stage in stages for block in stage.blocks]
    handles = [
        block.register_forward_pre_hook(lambda module, args: numbers.append(args[0].shape[1])) for block in blocks]
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    return numbers
