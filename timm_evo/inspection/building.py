""" Models by names and arguments that somebody has typed

timm checks few arguments: what is not allowed fails somewhere in timm or torch, by any error, and some of it only when
the model runs. Here all of that is one ValueError that says which name and arguments it came from.
"""
from typing import Any

import timm
import torch
from timm.models import is_model
from torch import nn

from ..api import evolve
from ..config import nearest
from ..errors import reason
from ..models.base import find_evolved, input_size
from ..models.registry import is_evolved

__all__ = ['build', 'build_without_weights', 'check_name']


def check_name(name: str) -> None:
    """Refuse a name that timm has no model of.

    Raises:
        ValueError: Which name is the nearest, if one is near.
    """
    if not is_model(name.partition('.')[0]):
        known = [evolved for evolved in timm.list_models('evo_*') if is_evolved(evolved)]
        meant = nearest(name, known)
        raise ValueError(
            f'timm has no model {name}.' + (f' Did you mean {meant}?' if meant else '')
            + f" The {len(known)} evolved ones are in timm.list_models('evo_*').")


def build_without_weights(
        name: str,
        model_kwargs: dict[str, Any],
        defaults: dict[str, Any] | None = None,
) -> nn.Module:
    """A model in evaluation mode, on the meta device, that has run once: so name and arguments are right.

    A dense model has been evolved.

    Args:
        name: As `timm.create_model` takes it.
        model_kwargs: Arguments of the model.
        defaults: Arguments that nobody has typed, where those are not given.

    Raises:
        ValueError: There is no such model, it cannot be evolved, or it does not work with these arguments.
    """
    if ':' not in name:  # as in hf-hub:user/name
        check_name(name)
    try:
        with torch.device('meta'), torch.no_grad():
            model = _create(name, False, (defaults or {}) | model_kwargs)
            evolved = find_evolved(model)[1] or evolve(model)
            model(next(model.parameters()).new_zeros(1, *input_size(evolved)))
    except Exception as error:
        raise ValueError(f'{name} cannot be used{_with(model_kwargs)}. {reason(error)}') from error
    return model


def build(
        name: str,
        model_kwargs: dict[str, Any],
        pretrained: bool = False,
        defaults: dict[str, Any] | None = None,
) -> nn.Module:
    """A model in evaluation mode.

    Args:
        name: As of `build_without_weights`.
        model_kwargs: Likewise.
        pretrained: Load the weights of that name.
        defaults: As of `build_without_weights`.

    Raises:
        ValueError: As `build_without_weights`, before weights are loaded; or they cannot be loaded.
    """
    build_without_weights(name, model_kwargs, defaults)
    try:
        model = _create(name, pretrained, (defaults or {}) | model_kwargs)
        if next(model.parameters()).is_meta:
            raise ValueError('There are no weights on the meta device.')
        return model
    except Exception as error:
        raise ValueError(f'{name} cannot be loaded{_with(model_kwargs)}. {reason(error)}') from error


def _create(name: str, pretrained: bool, model_kwargs: dict[str, Any]) -> nn.Module:
    # all that loads a file is given, so that it cannot be among the model's own arguments
    return timm.create_model(name, pretrained=pretrained, checkpoint_path=None, **model_kwargs).eval()


def _with(model_kwargs: dict[str, Any]) -> str:
    given = ', '.join(f'{key}={value!r}' for key, value in model_kwargs.items())
    return f' with {given}' if given else ''
