""" Other methods of token reduction, in their authors' code from clones of their repositories """
import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock, patch

import torch
from timm.models.vision_transformer import Attention, Block, LayerScale, VisionTransformer
from torch import nn

# modules that the clones import, but do not need for their models, or that no longer exist
NOT_NEEDED = ('torchprofile', 'tensorboardX', 'torch._six')

WithTome = Callable[[VisionTransformer, int], nn.Module]
WithEvit = Callable[[VisionTransformer, float], nn.Module]


def clone(text: str) -> Path:
    """A folder, as an argument of a command."""
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f'{text!r} is not a folder')
    return path


@contextmanager
def isolated_import(folder: Path) -> Iterator[None]:
    """A context for imports from a folder. Its modules do not stay in `sys.modules`, and its models are not in timm."""
    before = set(sys.modules)
    absent = {name: MagicMock() for name in NOT_NEEDED}
    sys.path.insert(0, str(folder))
    try:
        with patch.dict(sys.modules, absent), patch('timm.models.registry.register_model', lambda function: function):
            yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], '__file__', None)
            if file is not None and Path(file).is_relative_to(folder):
                del sys.modules[name]


def import_from(folder: Path, name: str) -> ModuleType:
    """A module of a clone."""
    with isolated_import(folder):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise SystemExit(f'{folder} has no module {name} that can be imported: {error}') from error


def _check_blocks(model: VisionTransformer) -> None:
    """Check that ToMe and EViT compute a model correctly. Both have copies of attention and blocks of an old timm."""
    if type(model) is not VisionTransformer:
        raise ValueError(f'it is a {type(model).__name__}')
    for block in model.blocks:
        if type(block) is not Block or type(block.attn) is not Attention:
            raise ValueError("its blocks are not timm's Block")
        attn = block.attn
        if not all(isinstance(norm, (nn.Identity, type(None))) for norm in (
                attn.q_norm, attn.k_norm, getattr(attn, 'norm', None), getattr(attn, 'gate', None))):
            raise ValueError('its attention has norms or a gate')
        if not (isinstance(block.ls1, nn.Identity) and isinstance(block.ls2, nn.Identity)):
            raise ValueError('its blocks have LayerScale')
    if model.num_prefix_tokens != 1 or not model.has_class_token:
        raise ValueError('it has registers or no class token')


def load_tome(folder: Path) -> WithTome:
    """ToMe, https://github.com/facebookresearch/ToMe.

    Returns:
        A function that adds ToMe to a model of timm, in place, with a number of tokens to merge in each block. It
        raises ValueError, with the reason, for a model that ToMe's code would compute wrongly.
    """
    tome = import_from(folder, 'tome.patch.timm')

    def with_tome(model: VisionTransformer, r: int) -> nn.Module:
        _check_blocks(model)
        tome.apply_patch(model)
        model.r = r
        return model
    return with_tome


def load_evit(folder: Path) -> WithEvit:
    """EViT, https://github.com/youweiliang/evit.

    Returns:
        A function that makes an EViT with the architecture and the parameters of a model of timm. It keeps a share of
        the tokens after a quarter, a half and three quarters of the blocks, and fuses the others. It raises ValueError,
        with the reason, for a model that EViT's code does not support.
    """
    evit = import_from(folder, 'evit')

    def with_evit(model: VisionTransformer, keep_rate: float) -> nn.Module:
        _check_blocks(model)
        if model.global_pool != 'token':
            raise ValueError('it does not classify by its class token')
        depth, mlp, norm = len(model.blocks), model.blocks[0].mlp, model.norm
        shrinks = {depth // 4, depth // 2, 3 * depth // 4}
        reduced = evit.EViT(
            img_size=model.patch_embed.img_size,
            patch_size=model.patch_embed.patch_size,
            in_chans=model.patch_embed.proj.in_channels,
            num_classes=model.num_classes,
            embed_dim=model.embed_dim,
            depth=depth,
            num_heads=model.blocks[0].attn.num_heads,
            mlp_ratio=mlp.fc1.out_features / model.embed_dim,
            qkv_bias=model.blocks[0].attn.qkv.bias is not None,
            norm_layer=partial(type(norm), eps=norm.eps),
            act_layer=type(mlp.act),
            keep_rate=tuple(keep_rate if i in shrinks else 1 for i in range(depth)),
            fuse_token=True,
        )
        try:
            reduced.load_state_dict(model.state_dict(keep_vars=True), assign=True)
        except RuntimeError as error:
            raise ValueError(f'its parameters differ. {" ".join(str(error).split())}') from error
        return reduced.train(model.training)
    return with_evit


@torch.no_grad()
def fold_layer_scale(model: VisionTransformer) -> VisionTransformer:
    """Merge LayerScale into the linear layers before it, in place. The model computes the same."""
    for block in model.blocks:
        if type(block) is not Block or not hasattr(block.mlp, 'fc2'):
            continue
        for name, linear in (('ls1', block.attn.proj), ('ls2', block.mlp.fc2)):
            scale = getattr(block, name)
            if isinstance(scale, LayerScale):
                linear.weight.mul_(scale.gamma.unsqueeze(1))
                if linear.bias is not None:
                    linear.bias.mul_(scale.gamma)
                setattr(block, name, nn.Identity())
    return model
