""" What evolved models have in common

An evolved model is timm's object with another class: the evolved one, which timm's class follows in its bases. So
evolution can be given to a model, changed, and taken away again, and weights stay where they are.
"""
import functools

from torch import nn

from .arguments import plain
from .layer_to_stage import LayerToStage

__all__ = ['Evolved', 'architecture', 'attribute_names', 'combined_class', 'dense_class']


class Evolved(LayerToStage):
    """Token evolution that can be changed at run time and taken away, to stand before a timm class in the bases.

    A family of models provides `init_evolution` and the methods that are not implemented here.

    Attributes:
        WEIGHTED_ARGUMENTS: Arguments of `init_evolution` that have weights, so that they can't change at run time.
        evolution: The arguments that `set_evolution` can change, as they are.
        dense_architecture: Name that timm creates the dense model by; empty for a model that timm has not created.
        _added: Names of the attributes that evolution has given to the model, for `restore` to take away.
    """
    # no annotations, which TorchScript would read as those of the model's class
    WEIGHTED_ARGUMENTS = frozenset()
    dense_architecture = ''
    evolution = {}

    def set_evolution(self, **arguments) -> None:
        """Change arguments of evolution at run time. A compiled model is compiled once more.

        Args:
            **arguments: What changes of the arguments of `init_evolution`, without those that have weights.

        Raises:
            TypeError: An argument is not known.
            ValueError: An argument is outside what is allowed; then nothing has changed.
        """
        arguments = plain(arguments)
        unknown = sorted(arguments.keys() - self.evolution.keys())
        if unknown:
            raise TypeError(f'{unknown[0]} cannot be set, only {", ".join(self.evolution)} can.')
        self._set_evolution(**self.evolution | arguments)
        # where a newer timm notes what it saves a model with; one that `evolve` has made is saved as dense
        if hasattr(self, '_model_args') and architecture(self).startswith('evo_'):
            self._model_args = self._model_args | arguments

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
        self.__class__ = dense_class(type(self))
        for name in names:
            if name in attribute_names(self):
                delattr(self, name)


def attribute_names(model: nn.Module) -> frozenset[str]:
    """Names of all that a module has of its own."""
    return frozenset([*vars(model), *model._modules, *model._buffers, *model._parameters])


def architecture(model: nn.Module) -> str:
    """Name that timm has created a model by, if it has."""
    return getattr(model, 'pretrained_cfg', {}).get('architecture', '')


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
