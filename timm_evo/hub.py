""" Evolved models as folders and as repositories of the Hugging Face Hub

timm writes and reads these. This module adds a model card with the settings of the evolution, and it never leaves an
incomplete model in a folder.
"""
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm  # noqa: F401  # before a part of it: a thread that imports timm may wait for the lock of a part
from timm.models._hub import generate_readme, push_to_hf_hub, save_for_hf
from torch import nn

from .config import plain
from .inspection.cost import count_gmacs
from .models.base import EvolvedModel, evaluating, find_evolved, input_size, is_created_evolved
from .models.registry import is_evolved

__all__ = ['model_card', 'push', 'save']

_FILES = ('model.safetensors', 'README.md', 'config.json')  # timm loads only folders with the last of them
_CITATION = """@inproceedings{xu2022evo,
  title     = {Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer},
  author    = {Xu, Yifan and Zhang, Zhijie and Zhang, Mengdan and Sheng, Kekai and Li, Ke and Dong, Weiming and Zhang, Liqing and Xu, Changsheng and Sun, Xing},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2022}
}"""  # noqa: E501


def model_card(model: nn.Module, name: str) -> dict[str, Any]:
    """Model card of an evolved model, for timm's `push_to_hf_hub(model_card=...)`.

    Args:
        model: A model of `timm.create_model('evo_*')`.
        name: Name by which `timm.create_model` will load the model, with `hf-hub:` or `local-dir:`.

    Returns:
        The parts from which timm's `generate_readme` makes the card.

    Raises:
        TypeError: The model is dense, or wraps an evolved one.
        ValueError: The model was created dense, so that timm would load it as dense. Or timm has not created it.
    """
    model = _check_created_evolved(model)
    begins, keep_ratio, _, tradeoff = model.schedule
    selections = [f'{ratio:.3g} at {i}' for i, ratio in enumerate(keep_ratio) if begins[i] and ratio < 1]
    is_learned = any(name.endswith('learn_tradeoff') for name in model.state_dict())
    image = next(model.parameters()).new_zeros(1, *input_size(model))
    with evaluating(model):
        gmacs = count_gmacs(model, image)
    evolution = {
        'Selection': model.evolution_config.selection,
        'Share of slow tokens, and the block (LeViT: attention) that selects them': ', '.join(selections),
    }
    if model.evolution_config.selection != 'similarity':
        evolution['Trade-off'] = 'learned' if is_learned else ', '.join(f'{alpha:g}' for alpha in tradeoff)
        evolution['Fast update of the other tokens'] = 'yes' if model.evolution_config.fast_update else 'no'
    return {
        'description': f"`{model.pretrained_cfg['architecture']}`, a model of timm with token evolution.",
        'details': {
            'Model Stats': {
                'Params (M)': f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f}',
                'GMACs': f'{gmacs:.3f}',
                'Image size': ' x '.join(map(str, image.shape[2:])),
                'Classes': model.num_classes,
            },
            'Token evolution': evolution,
            'Papers': ['Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer: '
                       'https://arxiv.org/abs/2108.01390'],
        },
        'usage': f"""```python
import timm  # with timm-evo installed

model = timm.create_model('{name}', pretrained=True).eval()
```""",
        'citation': _CITATION,
    }


def save(
        model: nn.Module,
        folder: str | Path,
        model_args: dict[str, Any] | None = None,
        force: bool = False,
) -> Path:
    """Write an evolved model as a folder that `timm.create_model('local-dir:<folder>', pretrained=True)` loads.

    All files are first written to a hidden folder inside the folder. The config.json of a model that is replaced is
    then removed, and the new files are moved to their places, config.json last. So during the call, or after a failure,
    the folder has the old model, the new model, or no config.json. Files of two models never load as one model.

    Args:
        model: A model of `timm.create_model('evo_*')`. It is unchanged afterwards.
        folder: Folder for config.json, model.safetensors and README.md. It may exist, and may be a symbolic link.
            Hidden files in it are kept.
        model_args: Arguments with which the model was created, without those of evolution. Only an older timm needs
            them; a newer one stores them in the model.
        force: Whether a model in the folder may be replaced.

    Returns:
        The folder.

    Raises:
        TypeError: The model is dense, or wraps an evolved one.
        ValueError: The model was created dense, so that timm would load it as dense. Or timm has not created it.
        FileExistsError: The folder has a model and `force` is not set, or it has other files that are not hidden.
    """
    model = _check_created_evolved(model)
    folder = Path(folder).absolute()
    check_free(folder, force)
    name = os.path.basename(os.path.abspath(folder))  # `.` and `..` have a name, too
    card = generate_readme(model_card(model, f'local-dir:{name}'), name)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix='.', suffix='.part', dir=folder) as parts:
            save_for_hf(model, parts, model_args=_plain_arguments(model, model_args), safe_serialization=True)
            Path(parts, 'README.md').write_text(card, encoding='utf-8')
            (folder / 'config.json').unlink(missing_ok=True)
            for file in _FILES:
                os.replace(Path(parts, file), folder / file)
    except BaseException:
        if is_new:
            with suppress(OSError):  # another process may have written to it
                folder.rmdir()
        raise
    return folder


def check_free(folder: Path, force: bool) -> None:
    """Raise an error if `save` may not write to a folder."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f'{folder} is a file. It must be a folder or must not exist.')
    visible = {path.name for path in folder.iterdir() if not path.name.startswith('.')}
    if others := sorted(visible.difference(_FILES)):
        raise FileExistsError(f'{folder} has other files than those of a model, such as {others[0]}.')
    if visible and not force:
        raise FileExistsError(f'{folder} has a model already ({min(visible)}). Use force=True (--force) to replace it.')


def push(model: nn.Module, repo_id: str, model_args: dict[str, Any] | None = None) -> str:
    """Push an evolved model to the Hub with timm's `push_to_hf_hub`: safetensors, config and model card.

    Args:
        model: A model of `timm.create_model('evo_*')`.
        repo_id: User and name of the repository.
        model_args: Arguments with which the model was created, without those of evolution. Only an older timm needs
            them; a newer one stores them in the model.

    Returns:
        The commit, which `hf-hub:user/name@commit` loads.

    Raises:
        TypeError: The model is dense, or wraps an evolved one.
        ValueError: The model was created dense, so that timm would load it as dense. Or timm has not created it.
    """
    model = _check_created_evolved(model)
    return push_to_hf_hub(
        model,
        repo_id,
        model_card=model_card(model, f'hf-hub:{repo_id}'),
        model_args=_plain_arguments(model, model_args),
        safe_serialization=True,
    ).oid


def _plain_arguments(model: EvolvedModel, model_args: dict[str, Any] | None) -> dict[str, Any] | None:
    """Convert `model_args` to plain values, for JSON, and also the arguments that a newer timm stores in the model.

    For an older timm, which stores none, those of evolution are added.
    """
    if hasattr(model, '_model_args'):
        model._model_args = plain(model._model_args)
        return plain(model_args)
    own = {name: getattr(model.evolution_config, name) for name in model.ARGUMENTS}
    return {name: value for name, value in own.items() if value is not None} | plain(model_args or {})


def _check_created_evolved(model: nn.Module) -> EvolvedModel:
    """Raise an error if timm would not load the model as it is now."""
    name = type(model).__name__
    if not isinstance(model, EvolvedModel):
        path, _ = find_evolved(model)
        raise TypeError(
            f'{name} is not evolved, but its submodule `.{path}` is. Use that one.' if path else
            f"{name} is not evolved. timm's save_for_hf and push_to_hf_hub write a dense model; "
            "timm.create_model('evo_*') creates an evolved one.")
    if not hasattr(model, 'pretrained_cfg'):
        raise ValueError(f'timm cannot load {name} again, because timm.create_model has not created it.')
    if not is_created_evolved(model):
        dense = model.dense_architecture
        raise ValueError(
            f'timm would load this model as the dense {dense}, because it was created dense and then evolved. ' + (
                f'Create evo_{dense} and load the weights into it.' if is_evolved(f'evo_{dense}') else
                "Restore it and save it with timm's save_for_hf or push_to_hf_hub."))
    return model
