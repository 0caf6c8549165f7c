""" What evolved models have in common

An evolved model is timm's object with another class: the evolved one, which timm's class follows in its bases. So
evolution can be given to a model, changed, and taken away again, and weights stay where they are.
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
        """timm's class, which stands behind `EvolvedModel` in the bases of a model."""
        set_input_size: Callable[..., None]
        prune_intermediate_layers: Callable[..., list[int]]
        reset_classifier: Callable[..., None]
        group_matcher: Callable[..., dict[str, Any]]
else:
    _Dense = object


class EvolvedModel(_Dense):
    """Token evolution that can be changed at run time and taken away, to stand before a timm class in the bases.

    A family of models provides the methods that are not implemented here.

    Attributes:
        ARGUMENTS: Those of `EvolutionConfig` that the family has.
        ABSENT_ARGUMENTS: Some that only other families have, and why this one has not.
        DEFAULT_SELECTION: Where none is given.
        evolution_config: The arguments as they are.
        schedule: What each block has to do, as it is in force.
        dense_architecture: Name that timm creates the dense model by; empty for a model that timm has not created.
        _record: Who is told what is selected, if anybody.
        _added: Names of the attributes that evolution has given to the model, for `restore` to take away.
    """
    ARGUMENTS: tuple[str, ...] = ARGUMENTS
    ABSENT_ARGUMENTS: dict[str, str] = {}
    DEFAULT_SELECTION = 'similarity'
    dense_architecture = ''
    _record: Record | None = None
    if TYPE_CHECKING:
        evolution_config: EvolutionConfig  # not `config`, by which PEFT knows models of transformers
        schedule: Schedule
        num_prefix_tokens: int
        _added: frozenset[str]

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    @property
    def evolution(self) -> dict[str, Any]:
        """The arguments that `set_evolution` can change, as they are."""
        return {name: getattr(self.evolution_config, name) for name in self.ARGUMENTS if name not in WEIGHTED}

    @takes_evolution_changes
    def set_evolution(self, **arguments: Any) -> None:
        """Change arguments of evolution at run time. A compiled model is compiled once more.

        Args:
            **arguments: Those of `EvolutionConfig` that are to change. What has weights (`class_head`; of a LeViT
                `class_token` and `learn_tradeoff`, too) cannot change.

        Raises:
            TypeError: An argument is not known, or cannot change at run time.
            ValueError: An argument is outside what is allowed; then nothing has changed.
        """
        for name in arguments:
            if name in WEIGHTED and name in self.ARGUMENTS:
                raise TypeError(f'{name} cannot change at run time, it has weights: create the model with it.')
        self.check_names(arguments, self.evolution)
        given = EvolutionConfig(**arguments)  # which also tells editors their names
        arguments = {name: getattr(given, name) for name in arguments}  # as plain values
        self._set_config(replace(self.evolution_config, **arguments))
        # where a newer timm notes what it saves a model with; one that `evolve` has made is saved as dense
        if hasattr(self, '_model_args') and is_created_evolved(self):
            self._model_args = self._model_args | arguments

    def init_evolution(self, config: EvolutionConfig) -> None:
        """Set up token evolution in a model that is dense so far.

        Raises:
            ValueError: An argument is outside what is allowed for this model, or leaves no patch token to select.
            TypeError: The model has blocks that cannot be evolved.
        """
        raise NotImplementedError

    @classmethod
    def split_arguments(cls, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Keyword arguments of a model as those of its evolution and those of timm's model, of plain values."""
        kwargs = plain(kwargs)
        own = {name: value for name, value in kwargs.items() if name in cls.ARGUMENTS}
        return own, {name: value for name, value in kwargs.items() if name not in own}

    @classmethod
    def check_names(cls, names: Collection[str], known: Collection[str]) -> None:
        """Refuse names of arguments of evolution that are not known.

        Raises:
            TypeError: There is one; the message says why, or names the nearest one.
        """
        for name in names:
            if name in cls.ABSENT_ARGUMENTS:
                raise TypeError(f'{name} is not an argument of {cls.__name__}, {cls.ABSENT_ARGUMENTS[name]}.')
            if name not in known:
                meant = nearest(name, known)
                hint = f'Did you mean {meant}?' if meant else f'There are {", ".join(sorted(known))}.'
                raise TypeError(f'{name} is not an argument of the evolution of {cls.__name__}. {hint}')

    @classmethod
    def check_model_names(cls, names: Collection[str]) -> None:
        """Refuse names among the arguments of a model that are misspelt ones of evolution; timm judges the others.

        Raises:
            TypeError: There is one; the message says why, or names the nearest one.
        """
        unknown = set(names).difference(cls.argument_names())
        misspelt = [name for name in unknown if name in cls.ABSENT_ARGUMENTS or nearest(name, cls.ARGUMENTS)]
        cls.check_names(misspelt, cls.ARGUMENTS)

    @classmethod
    def argument_names(cls) -> list[str]:
        """Names of the arguments that a model of this class takes: those of evolution, and those of timm's."""
        specs = [inspect.getfullargspec(vars(base)['__init__']) for base in cls.__mro__ if '__init__' in vars(base)]
        dense = {name for spec in specs for name in [*spec.args, *spec.kwonlyargs]} - {'self'}
        return sorted(dense.union(cls.ARGUMENTS))

    def extra_repr(self) -> str:
        """What `repr` of the model says of its evolution."""
        return ', '.join(f'{name}={value!r}' for name, value in self.evolution.items() if value is not None)

    def _resolve(self, config: EvolutionConfig) -> EvolutionConfig:
        """The config with the selection that the family takes where none is given."""
        return config if config.selection is not None else replace(config, selection=self.DEFAULT_SELECTION)

    def _set_config(self, config: EvolutionConfig) -> None:
        """Take arguments that can change at run time, or refuse one before anything is changed."""
        schedule = self._make_schedule(config)
        self.evolution_config = config
        if config.layerwise_updates and not isinstance(self, LayerToStage):
            change_class(self, layerwise_class)
        self._start_schedule(schedule)

    def _make_schedule(self, config: EvolutionConfig) -> Schedule:
        """The schedule of these arguments for the blocks that are there; refuses what the model does not allow."""
        raise NotImplementedError

    def _start_schedule(self, schedule: Schedule) -> None:
        """Begin with a new schedule; layer-to-stage training applies another one before it."""
        self._apply_schedule(schedule)

    def _apply_schedule(self, schedule: Schedule) -> None:
        """Go by a schedule from now on; a model that hands its parts on extends this."""
        self.schedule = schedule

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Prune layers or stages not required for specified intermediates, as timm's."""
        take_indices = super().prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        self._set_config(self.evolution_config)  # whose schedule is cut to the blocks that are left
        return take_indices

    def _follow_count(self) -> None:
        """Called by each forward pass; layer-to-stage training listens here."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != '_record'}  # copies tell nobody

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        num_updates = getattr(self, 'num_updates', None)
        if num_updates is None:
            state_dict.pop(f'{prefix}num_updates', None)  # of a model in layer-to-stage training, which this is not in
        else:  # also of a shallow copy of one, which has its buffers
            state_dict.setdefault(f'{prefix}num_updates', num_updates)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_restorable(self) -> None:
        """Refuse where no dense model has these weights."""

    def _restore_modules(self) -> None:
        """Give modules within the model their own classes again, those that have been changed so far."""
        raise NotImplementedError

    def _take_evolution_away(self, names: frozenset[str]) -> None:
        """Make the model dense again that has got attributes of these names by evolution."""
        self._restore_modules()
        change_class(self, dense_class)
        for name in names:
            if name in attribute_names(self):
                delattr(self, name)


def architecture(model: nn.Module) -> str:
    """Name that timm has created a model by, if it has."""
    return getattr(model, 'pretrained_cfg', {}).get('architecture', '')


def is_created_evolved(model: EvolvedModel) -> bool:
    """Whether timm's name of the model gives an evolved one, not the dense one that `evolve` has made it of."""
    return architecture(model) != model.dense_architecture


def input_size(model: EvolvedModel) -> tuple[int, int, int]:
    """Channels, height and width of the images of an evolved model."""
    embed = getattr(model, 'patch_embed', model)
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    return channels, *(embed.img_size or model.pretrained_cfg['input_size'][1:])


def find_evolved(model: object) -> tuple[str, EvolvedModel | None]:
    """The first evolved model within a module, or that itself, behind its name there, or None behind an empty one."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return next(((name, module) for name, module in modules if isinstance(module, EvolvedModel)), ('', None))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and every module in its own again afterwards."""
    training = model.training
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        model.train(training)  # LeViT forgets the biases that it has computed
        for module, mode in modes:
            module.training = mode


def dense_class(cls: type[nn.Module]) -> type[nn.Module]:
    """timm's class in the bases of an evolved one."""
    return next(base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, EvolvedModel))
