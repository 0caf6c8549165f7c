""" Model entrypoints

Every `evo_X` model is timm's `X` with token evolution. Its architecture and its pretrained configurations are taken
from timm's registration of `X`, so tags, Hub repositories and input sizes are timm's own. Importing this module
registers the models.
"""
from dataclasses import replace
from functools import partial

import timm
from torch.torch_version import TorchVersion

TIMM_MIN_VERSION = '1.0.13'  # as in setup.cfg
if TorchVersion(timm.__version__) < TIMM_MIN_VERSION:  # before the imports that an older timm fails
    raise ImportError(f'timm-evo needs timm>={TIMM_MIN_VERSION}, found timm {timm.__version__}.')

from timm.models import (
    PretrainedCfg,
    VisionTransformer,
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
)
from timm.models.vision_transformer import checkpoint_filter_fn

# The module, not its names: whoever imports it first imports timm, which imports this one while it is half done.
from . import vision_transformer

__all__ = []  # register_model adds each entrypoint

default_cfgs = {}


def _create_evolved(variant: str, dense: str, pretrained: bool = False, **kwargs) -> VisionTransformer:
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


def _register(variant: str, dense: str, cfgs: dict[str, PretrainedCfg]) -> None:
    """Register `variant`, timm's `dense` model with token evolution, with pretrained configurations by name and tag."""
    default_cfgs.update(generate_default_cfgs(cfgs))

    def entrypoint(pretrained: bool = False, **kwargs) -> VisionTransformer:
        return _create_evolved(variant, dense, pretrained=pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__doc__ = f"timm's `{dense}` with token evolution (https://arxiv.org/abs/2108.01390)."
    globals()[variant] = register_model(entrypoint)


def _register_twin(dense: str) -> None:
    """Register `evo_<dense>` with the weights of timm's `dense` model."""
    variant = f'evo_{dense}'
    cfgs = get_arch_pretrained_cfgs(dense)
    _register(variant, dense, {name.replace(dense, variant): cfg for name, cfg in cfgs.items()})


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
    _register_twin(_dense)

# The authors train DeiT-S at 384, too, which timm has no dense model of: no weights, and the input of DeiT-B at 384.
_register('evo_deit_small_patch16_384', 'deit_small_patch16_224', {
    'evo_deit_small_patch16_384': replace(get_pretrained_cfg('deit_base_patch16_384'), url='', hf_hub_id=None),
})
