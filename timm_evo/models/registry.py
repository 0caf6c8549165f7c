""" Model entrypoints

Every `evo_X` model is timm's `X` with token evolution. Its architecture and its pretrained configurations are taken
from timm's registration of `X`, so tags, Hub repositories and input sizes are timm's own. The import of this module
registers the models. Other code should import `entrypoints` for this.
"""
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import timm
from torch.torch_version import TorchVersion

TIMM_MIN_VERSION = '1.0.22'  # as in pyproject.toml
if TorchVersion(timm.__version__) < TIMM_MIN_VERSION:  # before the imports that fail with an older timm
    raise ImportError(f'timm-evo needs timm>={TIMM_MIN_VERSION}, but timm {timm.__version__} is installed.')

from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    is_model,
    list_models,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.eva import checkpoint_filter_fn as eva_filter_fn
from timm.models.levit import checkpoint_filter_fn as levit_filter_fn
from timm.models.levit import model_cfgs as levit_cfgs
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from timm.models.vision_transformer_hybrid import checkpoint_filter_fn as hybrid_filter_fn
from torch import nn

from ..config import EvolutionConfig

__all__ = []  # register_model adds each entrypoint

default_cfgs = {}


class _Family(NamedTuple):
    """How models of a family are built.

    Attributes:
        build: Makes the model without pretrained weights, from the name of timm's dense model and all arguments.
        filter_fn: timm's filter for checkpoints of the family.
        out_indices: Default of `features_only=True`, as in timm.
        has_similarity: Whether tokens can be selected by similarity, for weights trained without evolution.
        default_pool: Default pooling of a family whose checkpoints have an attention pool, which timm drops for other
            poolings; None for other families.
    """
    build: Callable[..., nn.Module]
    filter_fn: Callable[..., dict]
    out_indices: int | tuple[int, ...]
    has_similarity: bool = True
    default_pool: str | None = None


# Modules that import timm are imported when a model is built, see `timm_evo.entrypoints`.
def _build_vit(dense: str, **kwargs) -> nn.Module:
    from . import vision_transformer
    return _evolve(dense, vision_transformer.EvoVisionTransformer, kwargs)


def _build_eva(dense: str, **kwargs) -> nn.Module:
    from . import eva
    return _evolve(dense, eva.EvoEva, kwargs)


def _evolve(dense: str, evolved_cls: Any, kwargs: dict[str, Any]) -> nn.Module:
    """Create timm's `dense` model and evolve it; the arguments are those of timm and of evolution."""
    from . import evolving
    evolved_cls.check_model_names(kwargs)
    arguments, dense_args = evolved_cls.split_arguments(kwargs)
    model = model_entrypoint(dense)(pretrained=False, **dense_args)
    return evolving.give_evolution(model, evolving.evolved_class(model), EvolutionConfig(**arguments))


def _build_levit(dense: str, **kwargs) -> nn.Module:
    from . import levit
    levit.EvoLevit.check_model_names(kwargs)
    arguments: dict[str, Any] = dict(levit_cfgs[dense], **kwargs)
    model = levit.EvoLevit(**arguments)
    model.dense_architecture = dense
    return model


_VIT = _Family(_build_vit, vit_filter_fn, 3)
_DEIT = _Family(_build_vit, partial(vit_filter_fn, adapt_layer_scale=True), 3)
_FLEXI = _Family(_build_vit, partial(vit_filter_fn, interpolation='bilinear', antialias=False), 3)
_SIGLIP = _VIT._replace(default_pool='map')
_SIGLIP_GAP = _VIT._replace(default_pool='avg')
_HYBRID = _Family(_build_vit, hybrid_filter_fn, 3)
_EVA = _Family(_build_eva, eva_filter_fn, 3)
_LEVIT = _Family(_build_levit, levit_filter_fn, (0, 1, 2), has_similarity=False)


def _create(variant: str, dense: str, family: _Family, pretrained: bool = False, **kwargs) -> nn.Module:
    """Build timm's `dense` model with token evolution, under the name `variant`."""
    from . import download
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    if pretrained and not cfg.has_weights and not cfg.state_dict:
        raise RuntimeError(
            f'pretrained=True is not allowed for {variant}, because the Hugging Face Hub has no weights for it. '
            "`timm-evo convert` converts checkpoints of the authors' DeiT and LeViT.")
    out_indices = kwargs.pop('out_indices', family.out_indices)
    is_strict = kwargs.pop('pretrained_strict', True)
    if family.default_pool is not None and kwargs.get('global_pool', family.default_pool) != 'map':
        is_strict = False
    with download.checked_weights(variant, cfg, kwargs.get('cache_dir')) if pretrained else nullcontext():
        model = build_model_with_cfg(
            partial(family.build, dense),
            variant,
            pretrained,
            pretrained_filter_fn=family.filter_fn,
            pretrained_strict=is_strict,
            feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
            **kwargs,
        )
    if pretrained and family.has_similarity and _is_from_timm(cfg, variant):
        _warn_of_published_selection(variant, model)
    return model


def _is_from_timm(cfg: PretrainedCfg, variant: str) -> bool:
    """Whether the weights are timm's own for the dense model, and not a user's from a file, a folder or the Hub."""
    is_elsewhere = cfg.file or cfg.state_dict or cfg.source  # timm sets the last for hf-hub: and local-dir:
    own = get_arch_pretrained_cfgs(variant).values()
    return not is_elsewhere and (cfg.hf_hub_id, cfg.url) in [(timms.hf_hub_id, timms.url) for timms in own]


def _warn_of_published_selection(variant: str, model: nn.Module) -> None:
    """Warn that dense weights lose more with `'stage'`, the default of `evo_deit_*`, or `'layer'`."""
    from .base import find_evolved
    _, evolved = find_evolved(model)  # with features_only=True it is inside the model
    assert evolved is not None
    selection = evolved.evolution_config.selection
    if selection != 'similarity' and min(evolved.schedule.keep_ratio) < 1:
        warnings.warn(
            f"{variant} has timm's dense weights, but selection={selection!r} is for weights that were trained with "
            "token evolution. With dense weights, it loses more accuracy than selection='similarity'.",
            stacklevel=5,  # the line that calls timm.create_model
        )


def is_evolved(name: str) -> bool:
    """Whether the model of this name, with or without a tag, was registered here.

    The prefix is not enough: other packages may register `evo_*`, too.
    """
    name = name.partition('.')[0]
    return is_model(name) and model_entrypoint(name).__module__ == __name__


def _register(variant: str, dense: str, family: _Family, cfgs: dict[str, PretrainedCfg], **defaults) -> None:
    """Register `variant`, which is timm's `dense` model with token evolution. An existing model is not replaced.

    Args:
        variant: Name of the evolved model.
        dense: Name of timm's dense model.
        family: Family of the model.
        cfgs: Pretrained configurations by name and tag.
        **defaults: Default arguments of the evolved model that differ from those of its class.
    """
    if is_model(variant):
        return
    default_cfgs.update(generate_default_cfgs({**cfgs}))

    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        return _create(variant, dense, family, pretrained=pretrained, **(defaults | kwargs))

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__doc__ = f"timm's `{dense}` with token evolution (https://arxiv.org/abs/2108.01390)."
    globals()[variant] = register_model(entrypoint)


def _register_twin(dense: str, family: _Family) -> None:
    """Register `evo_<dense>` with the weights of timm's `dense` model."""
    variant = f'evo_{dense}'
    cfgs = get_arch_pretrained_cfgs(dense)
    # the paper's models select as in the paper; the others are for weights that were trained without token evolution
    defaults = {'selection': 'stage'} if dense.startswith('deit_') else {}
    _register(variant, dense, family, {name.replace(dense, variant): cfg for name, cfg in cfgs.items()}, **defaults)


def _without_weights(dense: str) -> PretrainedCfg:
    cfg = get_pretrained_cfg(dense)
    assert cfg is not None
    return replace(cfg, url='', hf_hub_id=None)


# Models without an `evo_*` twin: models with differential attention, because the difference of two attentions cannot be
# a score; and RADIO, because timm resizes its position embeddings in a special way (`evolve` works for it).
_WITHOUT = ['vit_d*wee_*', 'vit_dlittle_*', '*radio*']
# timm's module, wildcard of names, and family of these models; the first match counts
_VITS = [
    ('deit', '*', _DEIT),
    ('vision_transformer', 'flexivit_*', _FLEXI),
    ('vision_transformer', '*_siglip_gap_*', _SIGLIP_GAP),
    ('vision_transformer', '*_siglip_*', _SIGLIP),
    ('vision_transformer', '*', _VIT),
    ('vision_transformer_hybrid', '*', _HYBRID),
    ('eva', '*', _EVA),
]
for _module, _wildcard, _family in _VITS:
    for _dense in list_models(_wildcard, module=_module, exclude_filters=_WITHOUT):
        _register_twin(_dense, _family)

# The authors also train DeiT-S at 384. timm has no such dense model, so there are no weights, and the input is that of
# DeiT-B at 384.
_register('evo_deit_small_patch16_384', 'deit_small_patch16_224', _DEIT, {
    'evo_deit_small_patch16_384': _without_weights('deit_base_patch16_384'),
}, selection='stage')

for _size in ('128s', '128', '192', '256', '384'):
    _register_twin(f'levit_{_size}', _LEVIT)
    # the model that the authors publish
    _register(
        f'evo_levit_cls_{_size}',
        f'levit_{_size}',
        _LEVIT,
        {f'evo_levit_cls_{_size}': _without_weights(f'levit_{_size}')},
        class_token=True,
        learn_tradeoff=True,
    )
