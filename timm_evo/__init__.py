""" timm-evo: token evolution for timm's vision transformers

The import of this package is fast. It sets a hook that runs after the import of `timm.models`, and the hook registers
the `evo_*` models. PyTorch imports the package at the end of `import torch` (entry point group `torch.backends`), so
the models exist wherever timm is imported. `TORCH_DEVICE_BACKEND_AUTOLOAD=0` turns this off. `import timm_evo` then
registers the models.
"""
import importlib as _importlib  # with an underscore, so that completion leaves it out
import warnings as _warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names of `__getattr__`, for editors and type checkers
    from . import checkpoints, hub
    from .api import evolve, evolved, restore
    from .config import EvolutionConfig
    from .inspection.cost import count_gmacs
    from .inspection.tracing import Selection, trace
    from .inspection.visualization import visualize
    from .inspection.whole_grid import WholeGrid, whole_grid
    from .models.eva import EvoEva
    from .models.levit import EvoLevit
    from .models.vision_transformer import EvoVisionTransformer, EvoVisionTransformerDistilled
    from .tuning.tune import tune
    from .tuning.tuned import Tuned

__version__ = '0.2.0'
__all__ = [
    'EvoEva', 'EvoLevit', 'EvoVisionTransformer', 'EvoVisionTransformerDistilled', 'EvolutionConfig', 'Selection',
    'Tuned', 'WholeGrid',
    'checkpoints', 'count_gmacs', 'evolve', 'evolved', 'hub', 'restore', 'trace', 'tune', 'visualize',
    'whole_grid']
_MODULES = {  # module of each public name; the other public names are modules themselves
    'EvoEva': 'models.eva',
    'EvoLevit': 'models.levit',
    'EvoVisionTransformer': 'models.vision_transformer',
    'EvoVisionTransformerDistilled': 'models.vision_transformer',
    'EvolutionConfig': 'config',
    'Selection': 'inspection.tracing',
    'Tuned': 'tuning.tuned',
    'WholeGrid': 'inspection.whole_grid',
    'count_gmacs': 'inspection.cost',
    'evolve': 'api',
    'evolved': 'api',
    'restore': 'api',
    'trace': 'inspection.tracing',
    'tune': 'tuning.tune',
    'visualize': 'inspection.visualization',
    'whole_grid': 'inspection.whole_grid',
}


def autoload() -> None:
    """Do nothing. PyTorch calls this entry point at the end of `import torch`; the import of the package is enough."""


def _warn(error: Exception) -> None:
    _warnings.warn(
        f'timm-evo {__version__} could not register its models. timm works without them. '
        f'{type(error).__name__}: {error}',
        RuntimeWarning,
        stacklevel=2,
    )


def _register_models(timm_models) -> None:
    try:
        from .models import registry  # noqa: F401
    except Exception as error:  # any error, because `import timm` must not fail
        _warn(error)


def _register_with_timm() -> None:
    try:
        from wrapt import register_post_import_hook
    except Exception as error:  # because `import torch` must not fail
        _warn(error)
    else:
        register_post_import_hook(_register_models, 'timm.models')


def __getattr__(name: str):
    # public names are imported on demand, because they need torch and timm
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    import timm  # noqa: F401  # before a part of it, whose lock a thread that imports timm may wait for
    module = _importlib.import_module(f'{__name__}.{_MODULES.get(name, name)}')
    return getattr(module, name) if name in _MODULES else module


def __dir__() -> list[str]:
    return [*__all__, '__version__']


_register_with_timm()
