"""The recipes: what they say, and that timm's unchanged `train.py` trains by them.

Those tests that need `train.py` are skipped where TIMM_SCRIPTS does not name the folder that has it, see
test_timm_scripts.py.
"""
import csv
import math
import os
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from test_timm_scripts import Workplace
from timm.data import resolve_data_config
from timm.data.auto_augment import rand_augment_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.models import load_state_dict, save_for_hf

from timm_evo.checkpoints import _SETTINGS

ROOT = Path(__file__).parents[1]
FILES = {file.stem: file for file in sorted((ROOT / 'recipes').glob('*.yaml'))}
RECIPES = {name: yaml.safe_load(file.read_text()) for name, file in FILES.items()}
IMAGES = 1_281_167  # for training, in ImageNet-1k
AUGMENTATIONS = {recipe['aa'] for recipe in RECIPES.values()} | {
    recipe['train']['aa']
    for recipe in (yaml.safe_load(file.read_text()) for file in (ROOT / 'benchmarks' / 'recipes').glob('*.yaml'))
    if 'aa' in recipe['train']}
LAYERWISE_EPOCHS = 200
# options that may differ between the recipes of a family
OWN = {'model', 'model_kwargs', 'img_size', 'batch_size', 'drop_path', 'amp_dtype'}
CLASS_HEADS = ('norm_cls.', 'head_cls.', 'head_cls_dist.')

# what makes a run short: as small as a model can be without another number of blocks
DEIT = dict(img_size=32, patch_size=8, embed_dim=32, num_heads=2)
LEVIT = dict(img_size=128, embed_dim=(16, 24, 32), key_dim=8)
NUM_CLASSES = 10
BATCH_SIZE = 4
UPDATES = 5
NEEDS_SCRIPTS = pytest.mark.skipif(
    'TIMM_SCRIPTS' not in os.environ,
    reason="TIMM_SCRIPTS is not set, it must name a folder with train.py of timm's repository")
EACH_RECIPE = pytest.mark.parametrize('name', RECIPES)


def family(name: str) -> str:
    return 'LeViT' if 'levit' in name else 'DeiT'


def num_gpus(name: str) -> int:
    """Number of GPUs in the command that the recipe begins with."""
    numbers = dict(re.findall(r'--(nnodes|nproc_per_node)=(\d+)', FILES[name].read_text()))
    return int(numbers.get('nnodes', 1)) * int(numbers['nproc_per_node'])


def create(name: str, **others) -> torch.nn.Module:
    """The model of a recipe, as train.py creates it, but for `others`."""
    recipe = RECIPES[name]
    return timm.create_model(
        recipe['model'], global_pool=recipe['gp'], drop_path_rate=recipe['drop_path'],
        **recipe['model_kwargs'] | others)


def test_there_is_a_recipe_for_each_published_model():
    deit = ['tiny_patch16_224', 'small_patch16_224', 'base_patch16_224', 'small_patch16_384', 'base_patch16_384']
    levit = ['128s', '128', '192', '256', '384', '256_384', '384_384']
    assert {*(f'evo_deit_{size}' for size in deit), *(f'evo_levit_cls_{size}' for size in levit)} == RECIPES.keys()


@EACH_RECIPE
def test_the_model_is_the_published_one_with_a_second_head(name):
    with torch.device('meta'):
        model = create(name)
        published = timm.create_model(
            RECIPES[name]['model'], img_size=RECIPES[name]['model_kwargs'].get('img_size'), **_SETTINGS[family(name)])
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert [key for key in shapes if key.startswith('head_cls.')]
    assert {key: shape for key, shape in shapes.items() if not key.startswith((*CLASS_HEADS, 'num_updates'))} == {
        key: value.shape for key, value in published.state_dict().items()}
    settings = model.evolution | dict(layerwise_updates=0)
    assert settings == published.evolution and model._stagewise == published.schedule
    assert model.schedule.begins.count(True) > published.schedule.begins.count(True)  # it starts layer-wise


@EACH_RECIPE
def test_images_are_of_the_size_of_the_model(name):
    recipe = RECIPES[name]
    with torch.device('meta'):
        model = create(name)
    config = resolve_data_config(recipe, model=model)
    size = 384 if name.endswith('_384') and name != 'evo_levit_cls_384' else 224
    assert config['input_size'] == (3, size, size)
    assert math.floor(size / config['crop_pct']) == int(256 / 224 * size)  # as the authors resize before they crop
    assert config['mean'] == (0.485, 0.456, 0.406) and config['std'] == (0.229, 0.224, 0.225)


@EACH_RECIPE
def test_layerwise_updates_are_those_of_200_epochs(name):
    recipe = RECIPES[name]
    images = RepeatAugSampler(
        range(IMAGES), num_replicas=num_gpus(name), rank=0, num_repeats=recipe['aug_repeats'])
    per_epoch = len(images) // recipe['batch_size']  # the last, incomplete batch is dropped
    assert recipe['model_kwargs']['layerwise_updates'] == LAYERWISE_EPOCHS * per_epoch
    assert recipe['epochs'] == 300 and recipe['cooldown_epochs'] == 0  # which train.py would add
    assert f'{per_epoch} updates' in FILES[name].read_text()


@EACH_RECIPE
def test_the_recipe_begins_with_its_command_that_the_docs_have_too(name):
    docs = (ROOT / 'docs' / 'reproduce.md').read_text()
    recipe = RECIPES[name]
    assert f'--config recipes/{name}.yaml' in FILES[name].read_text()
    row, = re.findall(rf'^\| `{name}` \|(.*)\|$', docs, flags=re.MULTILINE)
    gpus, learning_rate, updates, _ = (cell.strip() for cell in row.split('|'))
    total = num_gpus(name) * recipe['batch_size']
    assert gpus == f'{num_gpus(name)} x {recipe["batch_size"]}'
    assert float(learning_rate) == recipe['lr_base'] * total / recipe['lr_base_size']
    assert int(updates.replace(',', '')) == recipe['model_kwargs']['layerwise_updates']


@EACH_RECIPE
def test_recipes_of_a_family_differ_only_in_what_is_listed(name):
    first = next(other for other in RECIPES if family(other) == family(name))
    assert {k: v for k, v in RECIPES[name].items() if k not in OWN} == {
        k: v for k, v in RECIPES[first].items() if k not in OWN}


@pytest.mark.parametrize('augmentation', sorted(AUGMENTATIONS))
def test_the_installed_pillow_takes_each_magnitude_that_the_augmentation_can_draw(augmentation):
    pixels = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for op in rand_augment_transform(augmentation, dict(translate_const=7, img_mean=(124, 116, 104))).ops:
        mean, std = op.magnitude, op.magnitude_std
        op.prob, op.magnitude_std = 1., 0.
        # of a normal distribution, 1 of 10^15 is further away; the operation cuts off what is above its maximum
        for magnitude in np.linspace(mean - 8 * std, mean + 8 * std, 65):
            op.magnitude = magnitude
            assert op(image).size == image.size


@NEEDS_SCRIPTS
def test_each_key_is_an_option_of_train_py():
    parser = runpy.run_path(os.path.join(os.environ['TIMM_SCRIPTS'], 'train.py'))['parser']
    options = {action.dest: action for action in parser._actions}
    for name, recipe in RECIPES.items():
        assert recipe.keys() <= options.keys(), name
        for key, value in recipe.items():
            option = options[key]
            if isinstance(value, dict):
                assert key == 'model_kwargs'
            elif option.nargs == 0:  # a flag
                assert isinstance(value, bool), (name, key)
            else:
                types = (int, float) if option.type is float else (option.type,)
                assert type(value) in types, (name, key)
                assert option.choices is None or value in option.choices, (name, key)


@pytest.fixture(scope='module')
def workplace(tmp_path_factory) -> Workplace:
    """timm's scripts, the recipes, images of noise, and a small teacher."""
    folder = tmp_path_factory.mktemp('recipes')
    pixels = np.random.default_rng(0)
    for split, number in (('train', UPDATES * BATCH_SIZE // NUM_CLASSES), ('validation', 1)):
        for i in range(NUM_CLASSES * number):
            file = folder / 'images' / split / str(i % NUM_CLASSES) / f'{i}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.integers(256, size=(40, 40, 3), dtype=np.uint8)).save(file)
    teacher_args = dict(img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=2, dynamic_img_size=True)
    teacher = timm.create_model('deit_tiny_patch16_224', num_classes=NUM_CLASSES, **teacher_args)
    save_for_hf(teacher, folder / 'teacher', model_args=teacher_args)
    (folder / 'recipes').symlink_to(ROOT / 'recipes')
    return Workplace(folder)


@NEEDS_SCRIPTS
@EACH_RECIPE
def test_train_py_trains_by_the_recipe(workplace, name):
    recipe = RECIPES[name]
    small = DEIT if family(name) == 'DeiT' else LEVIT
    kwargs = recipe['model_kwargs'] | small | dict(layerwise_updates=2)  # the other three are stage-wise
    overridden = dict(
        img_size=small['img_size'], batch_size=BATCH_SIZE, num_classes=NUM_CLASSES, epochs=1, warmup_epochs=0,
        aug_repeats=0,  # train.py repeats on several devices only
        data_dir='images', device='cpu', workers=0, output='output', experiment=name)
    if 'kd_model_name' in recipe:
        overridden['kd_model_name'] = 'local-dir:teacher'
    options = [word for key, value in overridden.items() for word in (f'--{key.replace("_", "-")}', value)]
    workplace.call(
        'train.py', '--config', f'recipes/{name}.yaml', *options,
        '--model-kwargs', *(f'{key}={value}'.replace(' ', '') for key, value in kwargs.items()))

    folder = workplace.folder / 'output' / name
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    assert {key: args[key] for key in recipe.keys() - {'model_kwargs'}} == {
        key: overridden.get(key, recipe[key]) for key in recipe.keys() - {'model_kwargs'}}
    with open(folder / 'summary.csv', newline='') as file:
        row, = csv.DictReader(file)
    assert all(math.isfinite(float(value)) for value in row.values())
    assert float(row['lr']) == pytest.approx(recipe['lr_base'] * BATCH_SIZE / recipe['lr_base_size'])

    for use_ema in (False, True):
        weights = load_state_dict(folder / 'last.pth.tar', use_ema=use_ema)
        assert weights['num_updates'] == UPDATES
        assert all(value.isfinite().all() for value in weights.values())
        # without the heads that the authors leave out at inference
        model = create(name, num_classes=NUM_CLASSES, **small, layerwise_updates=0, class_head=False)
        model.load_state_dict({key: value for key, value in weights.items() if not key.startswith(CLASS_HEADS)})
