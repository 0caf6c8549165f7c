""" Adding evolution to a dense model """
from typing import Any, cast

from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.levit import Levit, LevitDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils import parametrize

from ..config import DEFAULTS, EvolutionConfig, plain
from . import eva, levit, vision_transformer
from .base import EvolvedModel, architecture
from .classes import attribute_names, change_class, combined_class

__all__ = ['check_arguments', 'evolved_class', 'give_evolution']

# Evolution classes for any head; in the bases of an evolved class they come before timm's class or its subclass.
_EVOLUTIONS: dict[type[nn.Module], type[EvolvedModel]] = {
    VisionTransformer: vision_transformer.VisionTransformerEvolution,
    Eva: eva.EvaEvolution,
    Levit: levit.LevitEvolution,
}
# Evolved classes for timm's classes with their own heads; subclasses come before their bases.
_EVOLVED: dict[type[nn.Module], type[EvolvedModel]] = {
    VisionTransformerDistilled: vision_transformer.EvoVisionTransformerDistilled,
    VisionTransformer: vision_transformer.EvoVisionTransformer,
    Eva: eva.EvoEva,
    LevitDistilled: levit.EvoLevit,
}
# Methods that evolution replaces. A class that overrides one of these cannot be evolved.
_REPLACED = ('forward', 'forward_features', 'forward_intermediates', 'get_intermediate_layers')


def check_arguments(evolved_cls: type[EvolvedModel], arguments: dict[str, Any]) -> None:
    """Check that a model of this class has the arguments. Other arguments are allowed only with their default values.

    Raises:
        TypeError: An argument is not known.
        ValueError: An argument is only for a model that is created evolved.
    """
    if issubclass(evolved_cls, levit.LevitEvolution) and arguments.get('class_token'):
        raise ValueError(
            'class_token=True is not allowed for an existing model, because its attentions would lose their biases. '
            "Create a model with a class token by timm.create_model('evo_levit_cls_*').")
    changed = [name for name, value in arguments.items() if name not in DEFAULTS or plain(value) != DEFAULTS[name]]
    evolved_cls.check_names(changed, evolved_cls.ARGUMENTS)


def give_evolution(model: nn.Module, evolved_cls: type[EvolvedModel], config: EvolutionConfig) -> EvolvedModel:
    """Add token evolution to a dense timm model, in place. See `timm_evo.evolve` and `evolved_class`."""
    dense = attribute_names(model)
    change_class(model, lambda dense_cls: evolved_cls)
    model = cast(EvolvedModel, model)
    try:
        model.dense_architecture = architecture(model)
        model.init_evolution(config)
    except BaseException:
        model._take_evolution_away(attribute_names(model) - dense)
        raise
    return model


def _evolved_subclass(dense_cls: type[nn.Module], timm_cls: type[nn.Module]) -> type[EvolvedModel]:
    """The evolved class for `timm_cls`, a key of `_EVOLUTIONS`, or for a subclass with the same forward pass."""
    for method in _REPLACED:
        if hasattr(timm_cls, method) and getattr(dense_cls, method) is not getattr(timm_cls, method):
            raise TypeError(
                f"{dense_cls.__name__} cannot be evolved, because it overrides {method} of timm's "
                f'{timm_cls.__name__}.')
    if dense_cls in _EVOLVED:
        return _EVOLVED[dense_cls]
    for known_cls, evolved_cls in _EVOLVED.items():
        if issubclass(dense_cls, known_cls) and hasattr(known_cls, 'pool') and all(  # a LeViT has no `pool`
                getattr(dense_cls, name) is getattr(known_cls, name) for name in ('forward_head', 'pool')):
            return combined_class(evolved_cls, dense_cls)
    return combined_class(_EVOLUTIONS[timm_cls], dense_cls)


def evolved_class(model: nn.Module) -> type[EvolvedModel]:
    """The evolved class for a model.

    Raises:
        TypeError: The model cannot be evolved. The message has the reason.
    """
    if isinstance(model, str):
        raise TypeError(
            f'evolve takes a model, not its name {model!r}. timm.create_model creates an evolved model by one of the '
            'evo_* names.')
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f'evolve takes a model (torch.nn.Module), not an object of class {name}.')
    if isinstance(model, EvolvedModel):
        raise TypeError(f'{name} is evolved already. Use its set_evolution to change the arguments.')
    dense_cls = parametrize.type_before_parametrizations(model)
    for timm_cls in _EVOLUTIONS:
        if issubclass(dense_cls, timm_cls):
            return _evolved_subclass(dense_cls, timm_cls)
    for path, module in model.named_modules():
        if isinstance(module, EvolvedModel):
            raise TypeError(f'{name} has a submodule `.{path}` that is evolved already.')
        if isinstance(module, tuple(_EVOLUTIONS)):
            raise TypeError(
                f'{name} cannot be evolved, but its submodule `.{path}` ({type(module).__name__}) can. Evolve that '
                'one, before it is wrapped or compiled.')
    raise TypeError(f"{name} cannot be evolved, because {_reason(model)}. Models of timm's classes VisionTransformer, "
                    'Eva, Levit and their subclasses can be evolved.')


def _reason(model: nn.Module) -> str:
    names = ' '.join(name for name, _ in [*model.named_parameters(), *model.named_modules()]).lower()
    if 'rel_pos' in names or 'relative_position' in names:
        return 'its attention has biases by relative position, which need the whole grid'
    library = type(model).__module__.partition('.')[0]
    if library in ('torchvision', 'transformers'):
        return f"it is a model of {library}, and only timm's models can be evolved"
    if 'attn' not in names and 'attention' not in names:
        return 'it has no attention and no tokens to select'
    return "its forward pass is not that of timm's VisionTransformer, Eva or Levit"
