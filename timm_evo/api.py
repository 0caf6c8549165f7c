""" Token evolution for existing models """
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm  # noqa: F401  # before a part of it, whose lock a thread that imports timm may wait for
from timm.models import is_model
from torch import nn

from .config import EvolutionConfig, takes_evolution_arguments
from .models.base import EvolvedModel, architecture, find_evolved
from .models.evolving import check_arguments, evolved_class, give_evolution

__all__ = ['evolve', 'evolved', 'restore']


@takes_evolution_arguments
def evolve(model: nn.Module, **arguments: Any) -> EvolvedModel:
    """Give token evolution to a dense timm model, in place.

    Args:
        model: A `VisionTransformer`, an `Eva`, a `Levit`, or a model of a subclass with the same forward pass.
        **arguments: Arguments of `EvolutionConfig`.

    Returns:
        The same object. Its class is the evolved one; weights, device and mode are unchanged.

    Raises:
        TypeError: The model is of another class, it has blocks that cannot be evolved, or an argument is not known.
        ValueError: The value of an argument is not allowed.
    """
    evolved_cls = evolved_class(model)
    check_arguments(evolved_cls, arguments)
    return give_evolution(model, evolved_cls, EvolutionConfig(**arguments))


def restore(model: EvolvedModel) -> nn.Module:
    """Remove token evolution from a model, in place. The dense model has the current weights.

    Args:
        model: A model of `evolve` or `timm.create_model('evo_*')`.

    Returns:
        The same object, now of timm's class. A class head and learned trade-offs are removed.

    Raises:
        TypeError: The model is not evolved, or wraps an evolved model.
        ValueError: The model is a LeViT with a class token instead of biases. timm has no dense model of this kind.
    """
    if not isinstance(model, EvolvedModel):
        path, _ = find_evolved(model)
        raise TypeError(f'{type(model).__name__} is not evolved.' + (
            f' Its submodule `.{path}` is evolved. Restore that one.' if path else ''))
    model._check_restorable()
    dense_architecture, evolution_args = model.dense_architecture, model.ARGUMENTS
    model._take_evolution_away(model._added)
    if is_model(dense_architecture) and dense_architecture != architecture(model):  # timm saves these
        model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | {'architecture': dense_architecture}
        if hasattr(model, '_model_args'):
            model._model_args = {k: v for k, v in model._model_args.items() if k not in evolution_args}
    return model


@takes_evolution_arguments
@contextmanager
def evolved(model: nn.Module, **arguments: Any) -> Iterator[EvolvedModel]:
    """Evolve a model inside a `with`: `with timm_evo.evolved(model, keep_ratio=0.7):`.

    If the model is evolved already, its arguments are changed inside the `with`. Afterwards, also after an error, the
    model is as before.

    Args:
        model: A dense model as `evolve` takes it, or an evolved one.
        **arguments: Arguments of `EvolutionConfig`: those of `evolve`, or for an evolved model of `set_evolution`.

    Yields:
        The same object.

    Raises:
        TypeError: As in `evolve` or `set_evolution`.
        ValueError: As in `evolve` or `set_evolution`.
    """
    if not isinstance(model, EvolvedModel):
        model = evolve(model, **arguments)
        try:
            yield model
        finally:
            restore(model)
        return
    before, model_args = model.evolution, getattr(model, '_model_args', None)
    model.set_evolution(**arguments)
    try:
        yield model
    finally:
        model.set_evolution(**before)
        if model_args is not None:
            model._model_args = model_args
