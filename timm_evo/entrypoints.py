""" Model entrypoints

Every `evo_X` model is timm's `X` with token evolution. Its architecture and its pretrained configurations are taken
from timm's registration of `X`, so tags, Hub repositories and input sizes are timm's own. Importing this module
registers the models.
"""
from dataclasses import replace
from functools import partial

import timm
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    model_entrypoint,
    register_model,
)
from timm.models.vision_transformer import checkpoint_filter_fn

# The module, not its names: whoever imports it first imports timm, which imports this one while it is half done.
from . import vision_transformer

__all__ = []  # register_model adds each entrypoint

default_cfgs = {}


def _create_evolved(variant: str, dense: str, pretrained: bool = False, **kwargs):
    """Build timm's `dense` model with token evolution, under the name `variant`."""

    def build(**kwargs):
        evolution_args, dense_args = vision_transformer.split_evolution_args(kwargs)
        return vision_transformer.evolve(model_entrypoint(dense)(pretrained=False, **dense_args), **evolution_args)

    out_indices = kwargs.pop('out_indices', 3)
    return build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_filter_fn=partial(checkpoint_filter_fn, adapt_layer_scale=True),
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )


def _register(variant: str, dense: str, **cfg_overlay) -> None:
    """Register `variant`, timm's `dense` model with token evolution.

    Args:
        variant: Name of the evolved model.
        dense: Name of timm's dense model.
        **cfg_overlay: Where the pretrained configuration differs from the dense model's.
    """
    default_cfgs.update(generate_default_cfgs({
        name.replace(dense, variant): replace(cfg, **cfg_overlay)
        for name, cfg in get_arch_pretrained_cfgs(dense).items()
    }))

    def entrypoint(pretrained: bool = False, **kwargs):
        return _create_evolved(variant, dense, pretrained=pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__doc__ = f"timm's `{dense}` with token evolution (https://arxiv.org/abs/2108.01390)."
    globals()[variant] = register_model(entrypoint)


for _dense in (
    'deit_tiny_patch16_224',
    'deit_small_patch16_224',
    'deit_base_patch16_224',
    'deit_base_patch16_384',
    'deit_tiny_distilled_patch16_224',
    'deit_small_distilled_patch16_224',
    'deit_base_distilled_patch16_224',
    'deit_base_distilled_patch16_384',
    'test_vit',
):
    _register(f'evo_{_dense}', _dense)
