""" Common parts of evolved models

An evolved model is timm's object with another class, which has an evolution class and timm's class as bases. So
evolution can be added to a model, changed and removed, while the weights remain the same tensors.
"""
import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..config import ARGUMENTS, WEIGHTED, EvolutionConfig, nearest, plain, takes_evolution_changes
from ..method.schedule import Schedule
from ..method.selector import Record
from ..training.layer_to_stage import LayerToStage, layerwise_class
from .classes import attribute_names, change_class

__all__ = [
    'EvolvedModel', 'architecture', 'dense_class', 'evaluating', 'find_evolved', 'input_size', 'is_created_evolved']

if TYPE_CHECKING:
    class _Dense(nn.Module):
        """timm's class, which follows `EvolvedModel` in the bases of a model."""
        set_input_size: Callable[..., None]
        prune_intermediate_layers: Callable[..., list[int]]
        reset_classifier: Callable[..., None]
        group_matcher: Callable[..., dict[str, Any]]
else:
    _Dense = object


class EvolvedModel(_Dense):
    """Token evolution that can be changed at run time and removed; timm's class follows it in the bases of a class.

    A family of models provides the methods that are not implemented here.

    Attributes:
        ARGUMENTS: Arguments of `EvolutionConfig` that the family has.
        ABSENT_ARGUMENTS: Arguments that only other families have, each with the reason.
        DEFAULT_SELECTION: Selection if none is given.
        evolution_config: The current arguments.
        schedule: The current schedule of the blocks.
        dense_architecture: Name by which timm creates the dense model; empty for a model that timm has not created.
        _record: Object that records what is selected, if any.
        _added: Names of the attributes that evolution has added to the model, for `restore` to remove.
    """
    ARGUMENTS: tuple[str, ...] = ARGUMENTS
    ABSENT_ARGUMENTS: dict[str, str] = {}
    DEFAULT_SELECTION = 'similarity'
    dense_architecture = ''
    _record: Record | None = None
    if TYPE_CHECKING:
        evolution_config: EvolutionConfig  # not `config`, by which PEFT recognizes models of transformers
        schedule: Schedule
        num_prefix_tokens: int
        _added: frozenset[str]

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    @property
    def evolution(self) -> dict[str, Any]:
        """The current values of the arguments that `set_evolution` can change."""
        return {name: getattr(self.evolution_config, name) for name in self.ARGUMENTS if name not in WEIGHTED}

    @takes_evolution_changes
    def set_evolution(self, **arguments: Any) -> None:
        """Change arguments of evolution at run time. A compiled model is compiled again.

        Args:
            **arguments: Arguments of `EvolutionConfig` to change. Those that add weights cannot change: `class_head`,
                and in a LeViT also `class_token` and `learn_tradeoff`.

        Raises:
            TypeError: An argument is not known, or cannot change at run time.
            ValueError: A value is not allowed. Then nothing has changed.
        """
        for name in arguments:
            if name in WEIGHTED and name in self.ARGUMENTS:
                raise TypeError(f'{name} cannot change at run time, because it adds weights. Create the model with it.')
        self.check_names(arguments, self.evolution)
        given = EvolutionConfig(**arguments)
        arguments = {name: getattr(given, name) for name in arguments}  # as plain values
        self._set_config(replace(self.evolution_config, **arguments))
        # a newer timm stores here the arguments that it saves; a model from `evolve` is saved as dense
        if hasattr(self, '_model_args') and is_created_evolved(self):
            self._model_args = self._model_args | arguments

    def init_evolution(self, config: EvolutionConfig) -> None:
        """Set up token evolution in a dense model.

        Raises:
            ValueError: A value is not allowed for this model, or leaves no patch token to select.
            TypeError: The model has blocks that cannot be evolved.
        """
        raise NotImplementedError

    @classmethod
    def split_arguments(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split keyword arguments, as plain values, into those of evolution and those of timm's model."""
        kwargs = plain(kwargs)
        own = {name: value for name, value in kwargs.items() if name in cls.ARGUMENTS}
        return own, {name: value for name, value in kwargs.items() if name not in own}

    @classmethod
    def check_names(cls, names: Collection[str], known: Collection[str]) -> None:
        """Check names of arguments of evolution.

        Raises:
            TypeError: A name is not known. The message has the reason, or the most similar name.
        """
        for name in names:
            if name in cls.ABSENT_ARGUMENTS:
                raise TypeError(f'{name} is not an argument of {cls.__name__}, because {cls.ABSENT_ARGUMENTS[name]}.')
            if name not in known:
                meant = nearest(name, known)
                hint = f'Did you mean {meant}?' if meant else f'Its arguments are {", ".join(sorted(known))}.'
                raise TypeError(f'{name} is not an argument of the evolution of {cls.__name__}. {hint}')

    @classmethod
    def check_model_names(cls, names: Collection[str]) -> None:
        """Check arguments of a model for misspelt arguments of evolution. timm checks the others.

        Raises:
            TypeError: There is one. The message has the reason, or the most similar name.
        """
        unknown = set(names).difference(cls.argument_names())
        misspelt = [name for name in unknown if name in cls.ABSENT_ARGUMENTS or nearest(name, cls.ARGUMENTS)]
        cls.check_names(misspelt, cls.ARGUMENTS)

    @classmethod
    def argument_names(cls) -> list[str]:
        """Names of the arguments that a model of this class takes: those of evolution, and those of timm's class."""
        specs = [inspect.getfullargspec(vars(base)['__init__']) for base in cls.__mro__ if '__init__' in vars(base)]
        dense = {name for spec in specs for name in [*spec.args, *spec.kwonlyargs]} - {'self'}
        return sorted(dense.union(cls.ARGUMENTS))

    def extra_repr(self) -> str:
        """The arguments of evolution, for `repr` of the model."""
        return ', '.join(f'{name}={value!r}' for name, value in self.evolution.items() if value is not None)

    def _resolve(self, config: EvolutionConfig) -> EvolutionConfig:
        """The config with the family's default selection if none is given."""
        return config if config.selection is not None else replace(config, selection=self.DEFAULT_SELECTION)

    def _set_config(self, config: EvolutionConfig) -> None:
        """Apply arguments that can change at run time. An error is raised before anything has changed."""
        schedule = self._make_schedule(config)
        self.evolution_config = config
        if config.layerwise_updates and not isinstance(self, LayerToStage):
            change_class(self, layerwise_class)
        self._start_schedule(schedule)

    def _make_schedule(self, config: EvolutionConfig) -> Schedule:
        """The schedule of these arguments for the model's blocks. Raises an error if the model does not allow them."""
        raise NotImplementedError

    def _start_schedule(self, schedule: Schedule) -> None:
        """Begin with a new schedule. Layer-to-stage training overrides this to apply another one before."""
        self._apply_schedule(schedule)

    def _apply_schedule(self, schedule: Schedule) -> None:
        """Use a schedule from now on. A model whose modules have parts of it extends this."""
        self.schedule = schedule

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Prune layers or stages not required for specified intermediates, as timm's."""
        take_indices = super().prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        self._set_config(self.evolution_config)  # which cuts the schedule to the remaining blocks
        return take_indices

    def _follow_count(self) -> None:
        """Called by each forward pass. Layer-to-stage training overrides this."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != '_record'}  # copies have none

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        num_updates = getattr(self, 'num_updates', None)
        if num_updates is None:
            state_dict.pop(f'{prefix}num_updates', None)  # from layer-to-stage training, which this model is not in
        else:  # also in a shallow copy, which shares the buffers
            state_dict.setdefault(f'{prefix}num_updates', num_updates)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_restorable(self) -> None:
        """Raise an error if no dense model of timm has these weights."""

    def _restore_modules(self) -> None:
        """Give the submodules that have been changed their original classes again."""
        raise NotImplementedError

    def _take_evolution_away(self, names: frozenset[str]) -> None:
        """Make the model dense again, and remove the attributes of these names, which evolution has added."""
        self._restore_modules()
        change_class(self, dense_class)
        for name in names:
            if name in attribute_names(self):
                delattr(self, name)


def architecture(model: nn.Module) -> str:
    """Name by which timm has created a model; empty if it has not."""
    return getattr(model, 'pretrained_cfg', {}).get('architecture', '')


def is_created_evolved(model: EvolvedModel) -> bool:
    """Whether timm has created the model evolved, and not dense for a later `evolve`."""
    return architecture(model) != model.dense_architecture


def input_size(model: EvolvedModel) -> tuple[int, int, int]:
    """Channels, height and width of the images of an evolved model."""
    embed = getattr(model, 'patch_embed', model)
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    return channels, *(embed.img_size or model.pretrained_cfg['input_size'][1:])


def find_evolved(model: object) -> tuple[str, EvolvedModel | None]:
    """Name and module of the first evolved model in a module or the module itself; ('', None) if there is none."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return next(((name, module) for name, module in modules if isinstance(module, EvolvedModel)), ('', None))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context of evaluation mode. Afterwards, every module has its previous mode again."""
    training = model.training
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        model.train(training)  # clears the cached biases of a LeViT
        for module, mode in modes:
            module.training = mode


def dense_class(cls: type[nn.Module]) -> type[nn.Module]:
    """timm's class in the bases of an evolved one."""
    return next(base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, EvolvedModel))
