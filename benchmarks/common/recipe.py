""" Recipes of `accuracy.py`: YAML files with the models to train and the options

    train:     options of timm's train.py, as in the YAML file of its --config
    seeds:     seeds of each variant without its own seeds
    variants:  label: {model: ..., model_kwargs: {...}, seeds: [...], and other options of train.py}

`layerwise_share` of a variant is the share of its updates with layer-wise selection. It sets the model's argument
`layerwise_updates`.
"""
import argparse
import math
import re
import runpy
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

# options of train.py that accuracy.py sets
PLACES = (
    'data', 'data_dir', 'train_split', 'val_split', 'output', 'experiment', 'seed', 'device', 'workers', 'resume',
    'start_epoch', 'checkpoint_hist',
)
# options of train.py that must be the same for all variants, and are in tables and titles
SHARED = ('epochs', 'batch_size', 'amp', 'amp_dtype')
# options of train.py that change the number of batches in an epoch, which `layerwise_share` counts
OTHER_BATCHES = ('dataset', 'epoch_repeats', 'train_batches_per_epoch', 'train_img_sizes', 'naflex_loader')


@dataclass
class Entry:
    """One variant of a recipe.

    Attributes:
        label: Its name.
        options: Options of train.py, `model` and `model_kwargs` among them, without `layerwise_updates`.
        seeds: Seeds, with one training each.
        layerwise_share: Share of the updates with layer-wise selection.
    """
    label: str
    options: dict
    seeds: list[int]
    layerwise_share: float

    def count(self, script: Path, num_images: int) -> tuple[int, int]:
        """Epochs and optimizer updates of one training, as train.py counts them."""
        args = parse_options(script, self.options)
        num_batches = num_images // args.batch_size  # the loader drops the last ones
        if num_batches == 0:
            raise SystemExit(f'{self.label}: {num_images} images do not fill one batch of {args.batch_size}')
        updates_per_epoch = math.ceil(num_batches / max(1, args.grad_accum_steps))
        # cool-down, cycles and warm-up may add epochs
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        _, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
        return num_epochs, num_epochs * updates_per_epoch

    def training_options(self, num_updates: int, seed: int) -> dict:
        """Options of one training."""
        kwargs = dict(self.options.get('model_kwargs', {}))
        if self.layerwise_share:
            kwargs['layerwise_updates'] = round(self.layerwise_share * num_updates)
        return {**self.options, 'model_kwargs': kwargs, 'seed': seed}


def parse_options(script: Path, options: dict) -> argparse.Namespace:
    """The arguments that the parser of train.py makes from `options`. train.py would ignore unknown names."""
    parser = runpy.run_path(str(script))['parser']
    unknown = sorted(set(options) - set(vars(parser.parse_args([]))))
    if unknown:
        raise SystemExit(f'The recipe has options that train.py does not know: {", ".join(unknown)}')
    parser.set_defaults(**options)
    return parser.parse_args([])


def read_recipe(path: Path, seeds: list[int] | None, epochs: int | None) -> list[Entry]:
    """The variants of a recipe.

    Args:
        path: YAML file.
        seeds: Seeds instead of those of the recipe.
        epochs: Epochs instead of those of the recipe.
    """
    try:
        recipe = yaml.safe_load(path.read_text())
        train, variants = recipe.pop('train'), recipe.pop('variants')
        recipe_seeds = recipe.pop('seeds')
    except (yaml.YAMLError, AttributeError, KeyError) as error:
        raise SystemExit(f'{path} is not a recipe with train, seeds and variants: {error}') from error
    if recipe:
        raise SystemExit(f'{path} has more than train, seeds and variants: {", ".join(recipe)}')
    entries = []
    for label, options in variants.items():
        options = {**train, **options}
        if epochs is not None:
            options['epochs'] = epochs
        own_seeds = options.pop('seeds', recipe_seeds)
        entry = Entry(label, options, seeds or own_seeds, options.pop('layerwise_share', 0))
        _check(entry)
        entries.append(entry)
    for option in SHARED:
        if len({str(entry.options.get(option)) for entry in entries}) > 1:
            raise SystemExit(f'{path}: {option} must be the same for all variants, which are compared with each other')
    return entries


def _check(entry: Entry) -> None:
    if not re.fullmatch(r'\w[\w.=-]*', entry.label):
        raise SystemExit(f'{entry.label!r} cannot be the name of a folder. Use letters, digits, and . _ = -')
    if 'model' not in entry.options:
        raise SystemExit(f'{entry.label} has no model')
    if not 0 <= entry.layerwise_share <= 1:
        raise SystemExit(f'{entry.label}: layerwise_share must be in [0, 1], not {entry.layerwise_share}')
    if 'layerwise_updates' in entry.options.get('model_kwargs', {}):
        raise SystemExit(f'{entry.label}: layerwise_updates depends on the images. Set layerwise_share instead.')
    refused = [name for name in (*PLACES, *OTHER_BATCHES) if name in entry.options]
    if refused:
        raise SystemExit(f'{entry.label}: a recipe cannot set {", ".join(refused)}')
