""" Evolved models as folders and repositories of the Hugging Face Hub

timm writes and reads them. What is added here is a model card that says how tokens are evolved, and that a model is in
its folder as a whole or not at all.
"""
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm  # noqa: F401  # before a part of it, whose lock a thread that imports timm may wait for
from timm.models._hub import generate_readme, push_to_hf_hub, save_for_hf
from torch import nn

from .config import plain
from .inspection.cost import count_gmacs
from .models.base import EvolvedModel, evaluating, find_evolved, input_size, is_created_evolved
from .models.registry import is_evolved

__all__ = ['model_card', 'push', 'save']

_FILES = ('model.safetensors', 'README.md', 'config.json')  # the last makes a model of the others
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
        name: What `timm.create_model` is called with to get it from where the card will be.

    Returns:
        The parts that timm's `generate_readme` puts together.

    Raises:
        TypeError: The model is dense, or wraps an evolved one.
        ValueError: The model was dense when it was created, and would be so again; or timm has not created it.
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

    All files are written inside the folder, into a hidden one, and take their places when they are complete,
    config.json last. A model that is replaced loses its config.json first. So what the folder has while this runs, or
    after it has failed, is the model from before, no model for want of a config.json, or the new one, and never files
    of two models that load as one.

    Args:
        model: A model of `timm.create_model('evo_*')`. It is as it was afterwards.
        folder: Where to: config.json, model.safetensors and README.md. It may be there, and be a symbolic link. Hidden
            files in it are left alone.
        model_args: Arguments that the model was created with beside those of evolution, for a timm that does not note
            them itself.
        force: Replace what such a folder had in it.

    Returns:
        The folder.

    Raises:
        TypeError: The model is dense, or wraps an evolved one.
        ValueError: The model was dense when it was created, and would be so again; or timm has not created it.
        FileExistsError: The folder has a model in it and `force` is not set, or other files that are not hidden.
    """
    model = _check_created_evolved(model)
    folder = Path(folder).absolute()
    check_free(folder, force)
    name = os.path.basename(os.path.abspath(folder))  # of `.` and `..`, too
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
            with suppress(OSError):  # somebody else has written to it
                folder.rmdir()
        raise
    return folder


def check_free(folder: Path, force: bool) -> None:
    """Refuse a folder that `save` would not write, see there."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f'{folder} is not a folder.')
    visible = {path.name for path in folder.iterdir() if not path.name.startswith('.')}
    if others := sorted(visible.difference(_FILES)):
        raise FileExistsError(f'{folder} has other files than those of a model, such as {others[0]}.')
    if visible and not force:
        raise FileExistsError(f'{folder} has a model already ({min(visible)}), only force (--force) replaces it.')


def push(model: nn.Module, repo_id: str, model_args: dict[str, Any] | None = None) -> str:
    """Push an evolved model to the Hub with timm's `push_to_hf_hub`: safetensors, config and model card.

    Args:
        model: A model of `timm.create_model('evo_*')`.
        repo_id: User and name of the repository.
        model_args: Arguments that the model was created with beside those of evolution, for a timm that does not note
            them itself.

    Returns:
        The commit, which `hf-hub:user/name@commit` loads.

    Raises:
        TypeError: The model is dense, or wraps an evolved one.
        ValueError: The model was dense when it was created, and would be so again; or timm has not created it.
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
    """Make plain values, for JSON, of the arguments that a newer timm has noted as they were given, and of these.

    For an older timm, which notes none, those of evolution are added.
    """
    if hasattr(model, '_model_args'):
        model._model_args = plain(model._model_args)
        return plain(model_args)
    own = {name: getattr(model.evolution_config, name) for name in model.ARGUMENTS}
    return {name: value for name, value in own.items() if value is not None} | plain(model_args or {})


def _check_created_evolved(model: nn.Module) -> EvolvedModel:
    """Refuse what would not be loaded as it is."""
    name = type(model).__name__
    if not isinstance(model, EvolvedModel):
        path, _ = find_evolved(model)
        raise TypeError(
            f'{name} is not evolved, it has an evolved model as `.{path}`: take that.' if path else
            f"{name} is not evolved. timm's save_for_hf and push_to_hf_hub write a dense model; an evolved one is made "
            "by timm.create_model('evo_*').")
    if not hasattr(model, 'pretrained_cfg'):
        raise ValueError(f'{name} cannot be loaded by timm, it has no name: timm.create_model has not made it.')
    if not is_created_evolved(model):
        dense = model.dense_architecture
        raise ValueError(
            f'A model that evolve has made of {dense} would be loaded as dense as it was created. ' + (
                f'Create evo_{dense} and load the weights into it.' if is_evolved(f'evo_{dense}') else
                f"Restore it and save it as {dense}, by timm's save_for_hf or push_to_hf_hub."))
    return model
