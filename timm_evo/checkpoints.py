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


def from_official(state_dict: dict[str, Tensor], class_head: bool = True) -> dict[str, Tensor]:
    """Map the state dict of an official Evo-ViT DeiT onto `EvoVisionTransformer`.

    The model to load it into has `global_pool='avg'` and, to compute the same, `fast_update=False`. The authors train
    with the head on the class token and leave it out at inference.

    Args:
        state_dict: The official model's state dict.
        class_head: Keep the head on the class token, for a model with `class_head=True`.

    Returns:
        State dict of the model here; tensors are shared where they need not be joined.

    Raises:
        ValueError: The names are not those of an official Evo-ViT DeiT.
    """
    missing = [k for k in ('cls_token', 'qks.0.qk.weight', 'vs.0.v.weight', 'norm_cls.weight') if k not in state_dict]
    if missing:
        raise ValueError(f'Not the state dict of an official Evo-ViT DeiT, it has no {", ".join(missing)}.')

    out_dict = {}
    for name, value in state_dict.items():
        if name.startswith(('norm_cls.', 'head_cls.')) and not class_head:
            continue
        if match := re.fullmatch(r'qks\.(\d+)\.qk\.(weight|bias)', name):
            block, kind = match.groups()
            out_dict[f'blocks.{block}.attn.qkv.{kind}'] = torch.cat([value, state_dict[f'vs.{block}.v.{kind}']])
        elif not re.match(r'vs\.\d+\.v\.', name):
            for official, ours in _DEIT_NAMES:
                name = re.sub(f'^{official}', ours, name)
            out_dict[name] = value
    return out_dict
