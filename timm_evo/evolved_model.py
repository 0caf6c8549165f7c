""" What evolved models have in common

An evolved model is timm's object with another class: the evolved one, which timm's class follows in its bases. So
evolution can be given to a model, changed, and taken away again, and weights stay where they are.
"""
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn
from torch.nn.utils import parametrize

from .arguments import argument_names, nearest, plain, refuse_unknown
from .layer_to_stage import LayerToStage
from .torch_private import own_names

__all__ = [
    'Evolved', 'architecture', 'attribute_names', 'change_class', 'combined_class', 'dense_class', 'evaluating',
    'find_evolved', 'input_size', 'is_created_evolved']

UNCHANGED: Any = type('Unchanged', (), {'__repr__': lambda self: 'unchanged'})()  # None means an argument's default


class Evolved(LayerToStage):
    """Token evolution that can be changed at run time and taken away, to stand before a timm class in the bases.

    A family of models provides `init_evolution` and the methods that are not implemented here.

    Attributes:
        WEIGHTED_ARGUMENTS: Arguments of `init_evolution` that have weights, so that they can't change at run time.
        ABSENT_ARGUMENTS: Arguments that only other families have, and why this one has not.
        evolution: The arguments that `set_evolution` can change, as they are.
        dense_architecture: Name that timm creates the dense model by; empty for a model that timm has not created.
        _added: Names of the attributes that evolution has given to the model, for `restore` to take away.
    """
    # no annotations, which TorchScript would read as those of the model's class
    if TYPE_CHECKING:  # timm's class stands behind this one in the bases of a model
        _added: frozenset[str]
        fast_update: bool

        init_evolution: Callable[..., None]

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    WEIGHTED_ARGUMENTS = frozenset()
    ABSENT_ARGUMENTS = {}
    dense_architecture = ''
    evolution = {}

    def set_evolution(
            self,
            *,
            keep_ratio: float | Sequence[float] = UNCHANGED,
            start_block: int | None = UNCHANGED,
            stage_depth: int | None = UNCHANGED,
            selection: str = UNCHANGED,
            tradeoff: float | Sequence[float] | None = UNCHANGED,
            fast_update: bool = UNCHANGED,
            layerwise_updates: int = UNCHANGED,
            **misspelt: NoReturn,
    ) -> None:
        """Change arguments of evolution at run time. A compiled model is compiled once more.

        Args:
            keep_ratio: As of `evolve`, and so are all others.
            start_block: None for the default.
            stage_depth: None for the default; a LeViT has none.
            selection: 'similarity', 'stage' or 'layer'; 'stage' or 'layer' of a LeViT.
            tradeoff: None for the default.
            fast_update: Update placeholder tokens through the representative token.
            layerwise_updates: Number of optimizer updates with a selection per block.
            **misspelt: None; refused, and the nearest name is named.

        Raises:
            TypeError: An argument is not known, or cannot change at run time.
            ValueError: An argument is outside what is allowed; then nothing has changed.
        """
        arguments = dict(
            keep_ratio=keep_ratio, start_block=start_block, stage_depth=stage_depth, selection=selection,
            tradeoff=tradeoff, fast_update=fast_update, layerwise_updates=layerwise_updates)
        arguments = {name: value for name, value in arguments.items() if value is not UNCHANGED} | misspelt
        for name in arguments:
            if name in self.WEIGHTED_ARGUMENTS:
                raise TypeError(f'{name} cannot change at run time, it has weights: create the model with it.')
        self.check_names(arguments, self.evolution)
        arguments = plain(arguments)
        self._set_evolution(**self.evolution | arguments)
        # where a newer timm notes what it saves a model with; one that `evolve` has made is saved as dense
        if hasattr(self, '_model_args') and is_created_evolved(self):
            self._model_args = self._model_args | arguments

    @classmethod
    def check_names(cls, names: Collection[str], known: Collection[str]) -> None:
        """Refuse names of arguments of evolution that are not known.

        Raises:
            TypeError: There is one; the message says why, or names the nearest one.
        """
        for name in names:
            if name in cls.ABSENT_ARGUMENTS:
                raise TypeError(f'{name} is not an argument of {cls.__name__}, {cls.ABSENT_ARGUMENTS[name]}.')
        refuse_unknown(names, known, f'the evolution of {cls.__name__}')

    @classmethod
    def check_model_names(cls, names: Collection[str]) -> None:
        """Refuse names among the arguments of a model that are misspelt ones of evolution; timm judges the others.

        Raises:
            TypeError: There is one; the message says why, or names the nearest one.
        """
        evolution = argument_names(cls, ['init_evolution'])
        unknown = set(names).difference(argument_names(cls))
        misspelt = [name for name in unknown if name in cls.ABSENT_ARGUMENTS or nearest(name, evolution)]
        cls.check_names(misspelt, evolution)

    def extra_repr(self) -> str:
        """What `repr` of the model says of its evolution."""
        return ', '.join(f'{name}={value!r}' for name, value in self.evolution.items() if value is not None)

    def _set_evolution(self, **arguments) -> None:
        """Take all arguments that can change at run time, or refuse one before anything is changed."""
        raise NotImplementedError

    def _check_restorable(self) -> None:
        """Refuse where no dense model has these weights."""

    def _restore_modules(self) -> None:
        """Give modules within the model their own classes again, those that have been changed so far."""
        raise NotImplementedError

    def _take_evolution_away(self, names: frozenset[str]) -> None:
        """Make the model dense again that has got attributes of these names by evolution."""
        self._stop_counting()
        self._restore_modules()
        change_class(self, dense_class)
        for name in names:
            if name in attribute_names(self):
                delattr(self, name)


def attribute_names(model: nn.Module) -> frozenset[str]:
    """Names of all that a module has of its own."""
    return frozenset([*vars(model), *own_names(model)])


def architecture(model: nn.Module) -> str:
    """Name that timm has created a model by, if it has."""
    return getattr(model, 'pretrained_cfg', {}).get('architecture', '')


def is_created_evolved(model: Evolved) -> bool:
    """Whether timm's name of the model gives an evolved one, not the dense one that `evolve` has made it of."""
    return architecture(model) != model.dense_architecture


def input_size(model: Evolved) -> tuple[int, int, int]:
    """Channels, height and width of the images of an evolved model."""
    embed = getattr(model, 'patch_embed', model)
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    return channels, *(embed.img_size or model.pretrained_cfg['input_size'][1:])


def find_evolved(model: nn.Module) -> tuple[str, Evolved] | None:
    """The first evolved model within another module, or itself, and the name it has there; None if there is none."""
    return next(((name, module) for name, module in model.named_modules() if isinstance(module, Evolved)), None)


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


def change_class(module: nn.Module, new_class: Callable[[type[nn.Module]], type[nn.Module]]) -> None:
    """Give a module another class in the place of its own.

    PyTorch's parametrizations of a module are in a class that it derives from the module's own, and rolls back when the
    last one is removed. That class stays, derived from the new one.

    Args:
        module: The module, whose class is changed in place.
        new_class: From the class without parametrizations to the new one.
    """
    old_cls = parametrize.type_before_parametrizations(module)
    cls = new_class(old_cls)
    if cls is old_cls:
        return
    if parametrize.is_parametrized(module):
        own = {name: value for name, value in vars(type(module)).items() if name not in ('__dict__', '__weakref__')}
        cls = type(type(module).__name__, (cls,), own)
    module.__class__ = cls  # pyright: ignore[reportAttributeAccessIssue]


def dense_class(cls: type[nn.Module]) -> type[nn.Module]:
    """timm's class in the bases of an evolved one."""
    return next(base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, LayerToStage))


@functools.cache
def combined_class(evolved_cls: type[Evolved], dense_cls: type[nn.Module]) -> type[Evolved]:
    """The evolved class of a family for a class of timm or of its user."""
    return type(f'Evo{dense_cls.__name__}', (evolved_cls, dense_cls), {
        '__doc__': f'`{dense_cls.__name__}` with token evolution.',
        '__module__': dense_cls.__module__,
        # a copy or a file can't find it by its name
        '__reduce__': lambda self: (_new, (evolved_cls, dense_cls), self.__dict__),
    })


def _new(evolved_cls: type[Evolved], dense_cls: type[nn.Module]) -> Evolved:
    cls = combined_class(evolved_cls, dense_cls)
    return cls.__new__(cls)
