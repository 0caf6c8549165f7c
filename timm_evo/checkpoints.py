""" Conversion of the authors' checkpoints

Files and names are those of https://github.com/YifanXu74/Evo-ViT.
"""
import argparse
import pathlib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from .errors import reason
from .inspection.building import build
from .models import levit, vision_transformer
from .models.base import architecture
from .models.registry import is_evolved

# Classes of objects that training scripts store beside the weights. Apart from tensors and plain containers, others are
# refused.
_HARMLESS_CLASSES = [argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath]
# with these settings, the models compute the same as the authors' models at inference
_SETTINGS: dict[str, dict[str, Any]] = {
    'DeiT': dict(keep_ratio=0.5, selection='stage', global_pool='avg', fast_update=False),
    'LeViT': dict(keep_ratio=0.5, selection='stage', class_token=True, learn_tradeoff=True),
}
_CLASSES = {'DeiT': vision_transformer.EvoVisionTransformer, 'LeViT': levit.EvoLevit}
_HEADS = {'DeiT': 'head.weight', 'LeViT': 'head.l.weight'}

# official name -> name here; `_from_official_deit` joins the projections of queries and keys (`qks`) and values (`vs`)
_DEIT_NAMES: list[tuple[str, str]] = [
    (r'norms\.(\d+)\.', r'blocks.\1.norm1.'),
    (r'projs\.(\d+)\.', r'blocks.\1.attn.proj.'),
    (r'norm\.', r'fc_norm.'),
]
# official name -> name here, after `_from_official_levit` has replaced `blocks.N`
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
_LEVIT_BLOCK = re.compile(r'^blocks\.(\d+)\.')
_CLASS_HEADS = ('norm_cls.', 'head_cls.', 'head_cls_dist.')


def from_official(
        state_dict: dict[str, Tensor],
        class_head: bool = True,
        learn_tradeoff: bool = True,
) -> dict[str, Tensor]:
    """Rename the state dict of an official Evo-ViT for the models here.

    A DeiT needs a model with `global_pool='avg'`, and also `fast_update=False` to compute the same. A LeViT needs
    `class_token=True`, as in the models `evo_levit_cls_*`. The authors train with heads on the class token, but do not
    use these heads at inference.

    Args:
        state_dict: The official model's state dict.
        class_head: Keep the heads on the class token, for a model with `class_head=True`.
        learn_tradeoff: Keep the learned trade-offs of LeViT, for a model with `learn_tradeoff=True`.

    Returns:
        State dict of the model here. Tensors are shared unless they are joined. Unknown entries keep their names.

    Raises:
        ValueError: The names are not those of an official Evo-ViT.
    """
    family = _official_family(state_dict)
    if not class_head:
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith(_CLASS_HEADS)}
    return _from_official_deit(state_dict) if family == 'DeiT' else _from_official_levit(state_dict, learn_tradeoff)


def read_official(file: str | Path, use_ema: bool = False) -> dict[str, Tensor]:
    """Read the weights of a checkpoint file without running any code from it.

    Args:
        file: A file of `torch.save` with a state dict, or with a dictionary that has it under 'model' or 'model_ema',
            as the authors' scripts write it; or a safetensors file.
        use_ema: Read the averaged weights ('model_ema'). If the file has no others, they are read in any case.

    Returns:
        State dict with the names of the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, has other objects than weights, or has no state dict.
    """
    return _read(Path(file), ('model_ema', 'model') if use_ema else ('model', 'state_dict', 'model_ema'))


def load_weights(model: nn.Module, file: str | Path) -> None:
    """Load a checkpoint file of timm without running any code from it. As in timm, averaged weights are preferred.

    Args:
        model: The model that gets the weights.
        file: A file of `torch.save` with a state dict, or with a dictionary that has one, as timm's scripts write it;
            or a safetensors file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, has other objects than weights, or does not fit the model.
    """
    state_dict = _read(Path(file), ('state_dict_ema', 'model_ema', 'state_dict', 'model'))
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        some = list(_misfits(state_dict, model.state_dict()))
        more = f'; and {len(some) - 3} more' if len(some) > 3 else ''
        raise ValueError(
            f'{file} does not fit {architecture(model)}: {"; ".join(some[:3]) or reason(error)}{more}.') from error


def load_official(
        file: str | Path,
        model_name: str,
        use_ema: bool = False,
        **model_kwargs,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model for an official checkpoint, with the settings that it needs, and load the weights.

    Args:
        file: The checkpoint file, see `read_official`.
        model_name: An `evo_deit_*` or `evo_levit_cls_*` model of the same size.
        use_ema: Take the averaged weights.
        **model_kwargs: Arguments of the model that differ from the settings of the authors' models.

    Returns:
        The model in evaluation mode, without the heads that are not used at inference.
        The arguments with which `timm.create_model` has created it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, there is no such model, the model does not take the arguments, or the
            weights do not fit it. The message lists the misfits, or what is allowed.
    """
    return build_official(read_official(file, use_ema=use_ema), model_name, model_kwargs)


def build_official(
        state_dict: dict[str, Tensor],
        model_name: str,
        model_kwargs: dict[str, Any],
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model for an official state dict, see `load_official`."""
    family = _official_family(state_dict)
    models = timm.list_models(f'evo_{family.lower()}_*', exclude_filters='*_distilled_*')
    models = [name for name in models if is_evolved(name)]
    if model_name.partition('.')[0] not in models:
        raise ValueError(
            f'The checkpoint is an official Evo-{family}, so the model cannot be {model_name}. It can be one of: '
            f'{", ".join(models)}.')
    names = _CLASSES[family].argument_names()
    if unknown := sorted(model_kwargs.keys() - set(names)):
        raise ValueError(f'{model_name} has no argument {unknown[0]}. Its arguments are: {", ".join(names)}.')

    all_kwargs = _SETTINGS[family] | model_kwargs
    head = state_dict.get(_HEADS[family])
    if head is not None and head.dim() == 2:
        all_kwargs.setdefault('num_classes', head.shape[0])
    model = build(model_name, model_kwargs, defaults=all_kwargs)
    converted = from_official(
        state_dict, class_head=False, learn_tradeoff=all_kwargs.get('learn_tradeoff', False))
    misfits = list(_misfits(converted, model.state_dict()))
    if misfits:
        raise ValueError(f'The checkpoint does not fit {model_name}:\n  ' + '\n  '.join(misfits))
    model.load_state_dict(converted, strict=True)
    return model, all_kwargs


def _read(file: Path, keys: tuple[str, ...]) -> dict[str, Tensor]:
    """The state dict of a file, which is under the first of these keys or is the whole file. No code in it is run."""
    if not file.is_file():
        raise FileNotFoundError(f'There is no checkpoint {file}.')
    try:
        if file.suffix.lower() == '.safetensors':
            content = load_file(file)
        else:
            with torch.serialization.safe_globals(_HARMLESS_CLASSES):
                content = torch.load(file, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r'GLOBAL \S+', str(error))
        raise ValueError(
            f'{file} was refused and no code in it was run: it is not a checkpoint, or it has other objects than '
            f'weights{f" ({found[0]})" if found else ""}.') from error
    except Exception as error:  # a damaged file can cause any error
        raise ValueError(
            f'{file} cannot be read as a checkpoint: it is damaged or another kind of file ({reason(error, 120)}).'
        ) from error

    if isinstance(content, dict):
        content = next((content[key] for key in keys if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not content or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise ValueError(f'{file} has no state dict, neither directly nor under the key {" or ".join(keys)}.')
    return clean_state_dict(content)


def _misfits(state_dict: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterator[str]:
    """A line for each entry that is missing, surplus or of the wrong shape."""
    for name in expected:
        if name not in state_dict:
            yield f'missing: {name} {tuple(expected[name].shape)}'
    for name, value in state_dict.items():
        if name not in expected:
            yield f'surplus: {name} {tuple(value.shape)}'
        elif value.shape != expected[name].shape:
            yield f'wrong shape: {name} {tuple(value.shape)}, the model has {tuple(expected[name].shape)}'


def _official_family(state_dict: dict[str, Tensor]) -> str:
    if 'blocks.0.m1.m.qkv.c.weight' in state_dict:
        return 'LeViT'
    if 'qks.0.qk.weight' in state_dict:
        return 'DeiT'
    raise ValueError(
        'This is not the state dict of an official Evo-ViT: it has neither qks.0.qk.weight (DeiT) nor '
        'blocks.0.m1.m.qkv.c.weight (LeViT).')


def _rename(name: str, names: list[tuple[str, str]]) -> str:
    for official, ours in names:
        name = re.sub(f'^{official}', ours, name)
    return name


def _from_official_deit(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    out_dict = {_rename(name, _DEIT_NAMES): value for name, value in state_dict.items()}
    for name, qk in state_dict.items():
        if match := re.fullmatch(r'qks\.(\d+)\.qk\.(weight|bias)', name):
            block, kind = match.groups()
            v = state_dict.get(f'vs.{block}.v.{kind}')
            if v is not None and qk.shape[1:] == v.shape[1:]:  # otherwise both remain and are reported as misfits
                del out_dict[name], out_dict[f'vs.{block}.v.{kind}']
                out_dict[f'blocks.{block}.attn.qkv.{kind}'] = torch.cat([qk, v])
    return out_dict


def _from_official_levit(state_dict: dict[str, Tensor], learn_tradeoff: bool) -> dict[str, Tensor]:
    # the authors' `blocks` are the blocks of all stages and, between stages, a downsampling attention and its MLP
    places = {}
    stage = block = 0
    for i in sorted({int(match[1]) for match in map(_LEVIT_BLOCK.match, state_dict) if match}):
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
        # `stage_blocks` repeats entries of `blocks`
        if name.startswith('stage_blocks.') or name.endswith('learn_tradeoff') and not learn_tradeoff:
            continue
        name = _LEVIT_BLOCK.sub(lambda match: f'{places[int(match[1])]}.', name)
        out_dict[_rename(name, _LEVIT_NAMES)] = value
    return out_dict
