""" Token evolution for models that are there already """
from timm.models import is_model
from timm.models.levit import Levit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from . import levit, vision_transformer
from .arguments import split_arguments
from .evolved import Evolved, architecture, attribute_names

__all__ = ['evolve', 'restore']


def evolve(model: nn.Module, **evolution_args) -> Evolved:
    """Give token evolution to a dense timm model, in place.

    Args:
        model: A `VisionTransformer` or a `Levit`, or of a subclass that leaves its forward pass as it is.
        **evolution_args: Arguments of `TokenEvolution.init_evolution` or `LevitEvolution.init_evolution`.

    Returns:
        The same object, its class changed to the evolved one; weights, device and mode as they were.

    Raises:
        TypeError: The model is of another class, or has blocks that cannot be evolved.
        ValueError: An argument is outside what is allowed.
    """
    evolved_cls = _evolved_class(model)
    evolution_args, unknown = split_arguments(evolved_cls.init_evolution, evolution_args)
    if unknown:
        raise TypeError(
            f'{next(iter(unknown))} is no argument of evolution, see {evolved_cls.__name__}.init_evolution.')
    if evolution_args.get('class_token'):
        raise ValueError(
            'class_token=True is not allowed for a model that is there, it takes the biases of its attentions away. '
            "Create the published scheme by timm.create_model('evo_levit_cls_*').")
    dense = attribute_names(model)
    model.__class__ = evolved_cls
    try:
        model.dense_architecture = architecture(model)
        model.init_evolution(**evolution_args)
    except BaseException:
        model._take_evolution_away(attribute_names(model) - dense)
        raise
    return model


def restore(model: Evolved) -> nn.Module:
    """Take token evolution away again, in place: the dense model with the weights as they are now.

    Args:
        model: A model of `evolve` or `timm.create_model('evo_*')`.

    Returns:
        The same object, its class changed to timm's. Without a class head and learned trade-offs, if it had some.

    Raises:
        TypeError: The model is not evolved.
        ValueError: It has a class token in the place of LeViT's biases, so there is no dense model of it.
    """
    if not isinstance(model, Evolved):
        raise TypeError(f'{type(model).__name__} is not evolved, there is nothing to restore.')
    model._check_restorable()
    dense_architecture, evolution_args = model.dense_architecture, model.evolution.keys() | model.WEIGHTED_ARGUMENTS
    model._take_evolution_away(model._added)
    if is_model(dense_architecture) and dense_architecture != architecture(model):  # what timm saves is dense, too
        model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | {'architecture': dense_architecture}
        if hasattr(model, '_model_args'):
            model._model_args = {k: v for k, v in model._model_args.items() if k not in evolution_args}
    return model


def _evolved_class(model: nn.Module) -> type[Evolved]:
    """The class to give to a model; refuses what has none, with the reason."""
    name = type(model).__name__
    if isinstance(model, Evolved):
        raise TypeError(f'{name} is evolved already, its set_evolution changes the arguments.')
    if isinstance(model, VisionTransformer):
        return vision_transformer.evolved_class(type(model))
    if isinstance(model, Levit):
        return levit.evolved_class(type(model))
    wrapped = [child for child in model.children() if isinstance(child, (VisionTransformer, Levit))]
    if wrapped:
        raise TypeError(
            f'{name} cannot be evolved, it wraps {type(wrapped[0]).__name__}: evolve that, before it is wrapped, '
            'compiled or turned into a backbone.')
    names = ' '.join(name for name, _ in [*model.named_parameters(), *model.named_modules()])
    if 'rel_pos' in names or 'relative_position' in names:
        reason = 'its attention has biases by relative position, which need the whole grid'
    elif 'attn' not in names:
        reason = 'it has no attention, and so no tokens to select'
    else:
        reason = "its forward pass is not that of timm's VisionTransformer"
    raise TypeError(f'{name} cannot be evolved, {reason}. VisionTransformer, Levit and their subclasses can.')
