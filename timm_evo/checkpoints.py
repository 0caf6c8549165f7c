""" The authors' checkpoints

From the names of https://github.com/YifanXu74/Evo-ViT to those of timm's models.
"""
import re

import torch
from torch import Tensor

# official name -> name here; the projections of queries and keys (`qks`) and of values (`vs`) are joined beside
_DEIT_NAMES: list[tuple[str, str]] = [
    (r'norms\.(\d+)\.', r'blocks.\1.norm1.'),
    (r'projs\.(\d+)\.', r'blocks.\1.attn.proj.'),
    (r'norm\.', r'fc_norm.'),
]
# official name -> name here, once `blocks.N` stands for what it is here
_LEVIT_NAMES: list[tuple[str, str]] = [
    (r'patch_embed\.0\.', r'stem.conv1.'),
    (r'patch_embed\.2\.', r'stem.conv2.'),
    (r'patch_embed\.4\.', r'stem.conv3.'),
    (r'patch_embed\.6\.', r'stem.conv4.'),
    (r'(.*\.)m1\.m\.', r'\1attn.'),
    (r'(.*\.)m2\.m\.0\.', r'\1mlp.ln1.'),
    (r'(.*\.)m2\.m\.2\.', r'\1mlp.ln2.'),
    (r'(.*\.)m\.0\.', r'\1mlp.ln1.'),
    (r'(.*\.)m\.2\.', r'\1mlp.ln2.'),
    (r'(.*\.)(q|proj)\.1\.', r'\1\2.ln.'),
    (r'(.*\.)?poss$', r'\1pos_embed'),
    (r'(.*\.)[cl]\.(weight|bias)$', r'\1linear.\2'),
]
_CLASS_HEADS = ('norm_cls.', 'head_cls.', 'head_cls_dist.')


def from_official(
        state_dict: dict[str, Tensor],
        class_head: bool = True,
        learn_tradeoff: bool = True,
) -> dict[str, Tensor]:
    """Map the state dict of an official Evo-ViT onto the models here.

    DeiT: the model to load it into has `global_pool='avg'` and, to compute the same, `fast_update=False`. LeViT: it has
    `class_token=True`, as the models `evo_levit_cls_*`. The authors train with heads on the class token and leave them
    out at inference.

    Args:
        state_dict: The official model's state dict.
        class_head: Keep the heads on the class token, for a model with `class_head=True`.
        learn_tradeoff: Keep the learned trade-offs of LeViT, for a model with `learn_tradeoff=True`.

    Returns:
        State dict of the model here; tensors are shared where they need not be joined.

    Raises:
        ValueError: The names are not those of an official Evo-ViT.
    """
    if not class_head:
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith(_CLASS_HEADS)}
    if 'blocks.0.m1.m.qkv.c.weight' in state_dict:
        return _from_official_levit(state_dict, learn_tradeoff)
    if 'qks.0.qk.weight' in state_dict:
        return _from_official_deit(state_dict)
    raise ValueError(
        'Not the state dict of an official Evo-ViT, it has neither blocks.0.m1.m.qkv.c.weight (LeViT) nor '
        'qks.0.qk.weight (DeiT).')


def _rename(name: str, names: list[tuple[str, str]]) -> str:
    for official, ours in names:
        name = re.sub(f'^{official}', ours, name)
    return name


def _from_official_deit(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    out_dict = {}
    for name, value in state_dict.items():
        if match := re.fullmatch(r'qks\.(\d+)\.qk\.(weight|bias)', name):
            block, kind = match.groups()
            out_dict[f'blocks.{block}.attn.qkv.{kind}'] = torch.cat([value, state_dict[f'vs.{block}.v.{kind}']])
        elif not re.match(r'vs\.\d+\.v\.', name):
            out_dict[_rename(name, _DEIT_NAMES)] = value
    return out_dict


def _from_official_levit(state_dict: dict[str, Tensor], learn_tradeoff: bool) -> dict[str, Tensor]:
    # One sequence holds the blocks of all stages and, between them, an attention that downsamples and its MLP.
    places = {}
    stage = block = 0
    for i in sorted({int(name.split('.')[1]) for name in state_dict if name.startswith('blocks.')}):
        if f'blocks.{i}.m1.m.qkv.c.weight' in state_dict:
            places[i] = f'stages.{stage}.blocks.{block}'
            block += 1
        elif f'blocks.{i}.kv.c.weight' in state_dict:
            stage, block = stage + 1, 0
            places[i] = f'stages.{stage}.downsample.attn_downsample'
        else:
            places[i] = f'stages.{stage}.downsample'

    out_dict = {}
    for name, value in state_dict.items():
        # everything in `stage_blocks` stands in `blocks`, too
        if name.startswith('stage_blocks.') or name.endswith('learn_tradeoff') and not learn_tradeoff:
            continue
        name = re.sub(r'^blocks\.(\d+)', lambda match: places[int(match[1])], name)
        out_dict[_rename(name, _LEVIT_NAMES)] = value
    return out_dict
