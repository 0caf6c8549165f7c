""" timm-evo: token evolution for timm's vision transformers

Importing this package costs next to nothing: it asks to be called back when `timm.models` has been imported, and
registers the `evo_*` models then. PyTorch imports it at the end of `import torch` (entry point group `torch.backends`),
so the models are there wherever timm is. `TORCH_DEVICE_BACKEND_AUTOLOAD=0` turns that off; `import timm_evo` still
registers them.
"""
import importlib
import warnings

__version__ = '0.1.0'
__all__ = ['EvoLevit', 'EvoVisionTransformer', 'EvoVisionTransformerDistilled', 'evolve', 'restore']
_PUBLIC = {  # and where it is
    'EvoLevit': 'levit',
    'EvoVisionTransformer': 'vision_transformer',
    'EvoVisionTransformerDistilled': 'vision_transformer',
    'evolve': 'instances',
    'restore': 'instances',
}


def autoload() -> None:
    """Entry point that PyTorch calls at the end of `import torch`; importing the package for it was all there is."""


def _warn(error: Exception) -> None:
    warnings.warn(
        f'timm-evo {__version__} could not register its models, timm works without them. '
        f'{type(error).__name__}: {error}',
        RuntimeWarning,
        stacklevel=2,
    )


def _register_models(timm_models) -> None:
    try:
        from . import registry  # noqa: F401
    except Exception as error:  # whatever it is, `import timm` must not suffer
        _warn(error)


def _register_with_timm() -> None:
    try:
        from wrapt import register_post_import_hook
    except Exception as error:  # nor must `import torch`
        _warn(error)
    else:
        register_post_import_hook(_register_models, 'timm.models')


def __getattr__(name: str):
    # public names on demand, because they need torch and timm
    if name in _PUBLIC:
        import timm  # noqa: F401  # before a part of it, whose lock a thread that imports timm may wait for
        return getattr(importlib.import_module(f'{__name__}.{_PUBLIC[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


_register_with_timm()
