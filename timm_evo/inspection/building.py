""" Models from names and arguments that a user has typed

timm checks few arguments. A value that is not allowed causes an error of any type somewhere in timm or torch, sometimes
only when the model runs. Here, each such error becomes one ValueError with the name and the arguments.
"""
from typing import Any

import timm
import torch
from timm.models import is_model, load_model_config_from_hf, parse_model_name
from timm.models._hub import load_model_config_from_path
from torch import nn

from ..api import evolve
from ..config import ARGUMENTS, nearest
from ..errors import reason
from ..models.base import find_evolved, input_size
from ..models.registry import is_evolved

__all__ = ['build', 'build_without_weights', 'check_name']

# arguments of `evolve`, which a dense model gets after timm has created it; `class_token` is timm's own in a dense ViT
_OF_EVOLUTION = frozenset(ARGUMENTS) - {'class_token'}


def check_name(name: str) -> None:
    """Refuse a name that timm has no model of.

    Raises:
        ValueError: The name is not known. The message has the most similar name, if there is one.
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
    """Build an evolved model on the meta device and run it once, which checks name and arguments.

    Args:
        name: Name as `timm.create_model` takes it. A dense model is evolved.
        model_kwargs: Arguments of the model that the user has typed, those of evolution included.
        defaults: Arguments for names that are not in `model_kwargs`. Errors do not mention them.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: There is no such model, it cannot be evolved, or it does not work with these arguments.
    """
    if ':' not in name:  # names like hf-hub:user/name are not in timm's registry
        check_name(name)
    try:
        with torch.device('meta'), torch.no_grad():
            model = _create(name, False, (defaults or {}) | model_kwargs)
            _, evolved = find_evolved(model)
            assert evolved is not None
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
    """Build an evolved model.

    Args:
        name: See `build_without_weights`.
        model_kwargs: See `build_without_weights`.
        pretrained: Whether to load the pretrained weights of this name.
        defaults: See `build_without_weights`.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: As `build_without_weights`, before weights are loaded. Or the weights cannot be loaded.
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
    """Create a model, and evolve it if timm creates it dense."""
    evolution_args = {key: value for key, value in model_kwargs.items() if key in _OF_EVOLUTION}
    if evolution_args and _is_created_evolved(name):
        evolution_args = {}
    timm_args = {key: value for key, value in model_kwargs.items() if key not in evolution_args}
    # all arguments that load a file are given here, so that they cannot be among the model's arguments
    model = timm.create_model(name, pretrained=pretrained, checkpoint_path=None, **timm_args).eval()
    return evolve(model, **evolution_args) if find_evolved(model)[1] is None else model


def _is_created_evolved(name: str) -> bool:
    """Whether timm creates an evolved model for a name, which may be a Hub repository or a folder."""
    source, model_id = parse_model_name(name)
    if source:
        load_config = load_model_config_from_hf if source == 'hf-hub' else load_model_config_from_path
        name = load_config(model_id)[1]
    return is_evolved(name)


def _with(model_kwargs: dict[str, Any]) -> str:
    given = ', '.join(f'{key}={value!r}' for key, value in model_kwargs.items())
    return f' with {given}' if given else ''
