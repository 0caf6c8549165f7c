""" What a registered model is, in a few lines of text """
import itertools
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, is_model

from .arguments import argument_names, nearest
from .cost import count_gmacs
from .evolved_model import Evolved, input_size

__all__ = ['check_model', 'summarise']


def check_model(name: str) -> None:
    """Refuse a name that timm has no model of.

    Raises:
        ValueError: Which name is the nearest, if one is near.
    """
    known = timm.list_models('evo_*')
    if not is_model(name.partition('.')[0]):
        meant = nearest(name, known)
        raise ValueError(
            f'timm has no model {name}.' + (f' Did you mean {meant}?' if meant else '')
            + f" timm.list_models('evo_*') lists the {len(known)} evolved ones.")


def summarise(name: str, **kwargs: Any) -> str:
    """Settings, cost, tokens of each block and origin of the weights of an evolved model; no weights are made.

    Args:
        name: A registered `evo_*` model.
        **kwargs: Arguments of `timm.create_model`.

    Raises:
        TypeError: An argument is not known.
        ValueError: There is no such model, or an argument is outside what is allowed.
    """
    check_model(name)
    with torch.device('meta'):
        model = timm.create_model(name, **kwargs).eval()
        if not isinstance(model, Evolved):
            raise ValueError(f'{name} is not evolved, evo_{name} is.' if is_model(f'evo_{name}') else
                             f'{name} is not evolved.')
        image = torch.zeros(1, *input_size(model))
        evolution = argument_names(type(model), ['init_evolution'])
        dense_kwargs = {key: value for key, value in kwargs.items() if key not in evolution}
        dense = timm.create_model(model.dense_architecture, **dense_kwargs).eval()
        gmacs, dense_gmacs = count_gmacs(model, image), count_gmacs(dense, image)
        tokens = _count_tokens(model, image)
    weights = [
        f'{cfg.hf_hub_id or cfg.url}, as {key}'
        for key, cfg in get_arch_pretrained_cfgs(name.partition('.')[0]).items() if cfg.has_weights
    ]
    lines = [
        f"{name}: timm's {model.dense_architecture} with token evolution",
        f'  images      {" x ".join(map(str, image.shape[1:]))}',
        f'  parameters  {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M',
        f'  GMACs       {gmacs:.2f}, dense {dense_gmacs:.2f} ({gmacs / dense_gmacs:.0%})',
        f'  evolution   {model.extra_repr()}',
        '  weights     ' + ('\n' + 14 * ' ').join(weights or ['none; train it, or convert a checkpoint']),
        '  blocks      tokens (with class token and the like)',
    ]
    for number, run in itertools.groupby(enumerate(tokens), key=lambda pair: pair[1]):
        blocks = [i for i, _ in run]
        lines.append(f'  {f"{blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else blocks[0]!s:<10}  {number}')
    return '\n'.join(lines)


def _count_tokens(model: Evolved, image: torch.Tensor) -> list[int]:
    """Number of tokens that enter each block."""
    numbers: list[int] = []
    blocks = model.blocks if hasattr(model, 'blocks') else [block for stage in model.stages for block in stage.blocks]
    handles = [
        block.register_forward_pre_hook(lambda module, args: numbers.append(args[0].shape[1])) for block in blocks]
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    return numbers
