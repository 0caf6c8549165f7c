"""timm's own scripts, unchanged: train, resume, validate, benchmark, predict and export with evolved models.

Every command is a process of its own, as a user types it. The scripts are in timm's repository, not in its wheel:
TIMM_SCRIPTS names the folder that has them, from a version of the repository that goes with the installed timm.
TIMM_EVO_IMAGES, if set, names an image folder to use instead of scikit-learn's digits: train/<class>/ and
validation/<class>/ (or val/, test/) with at least ten classes of 16 images each.
"""
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_faithful import Reference
from timm.models import save_for_hf

from timm_evo import cli

pytestmark = pytest.mark.skipif(
    'TIMM_SCRIPTS' not in os.environ,
    reason="TIMM_SCRIPTS is not set, it must name a folder with train.py and the other scripts of timm's repository",
)

SCRIPTS = ['train.py', 'validate.py', 'benchmark.py', 'inference.py', 'onnx_export.py', 'onnx_validate.py']
NUM_CLASSES = 10
IMAGES_PER_CLASS = 16
BATCH_SIZE = 20
BATCHES = NUM_CLASSES * IMAGES_PER_CLASS // BATCH_SIZE

DATA = ['--data-dir', 'images', '--batch-size', BATCH_SIZE, '--workers', 0, '--device', 'cpu']
SHAPE = ['img_size=32', 'patch_size=8', 'embed_dim=64', 'num_heads=2']
SMALL = ['--img-size', 32, '--model-kwargs', *SHAPE, 'depth=6', 'start_block=2']
LEVIT = ['--img-size', 128, '--model-kwargs', 'img_size=128']
TINY = ['--img-size', 32, '--model-kwargs', *SHAPE, 'depth=2', 'start_block=1']  # compiling takes most of the time


@dataclass
class Training:
    """One way to call `train.py`.

    Attributes:
        model: Model and numerics, which `validate.py` and `inference.py` are told in the same words.
        options: Further options of `train.py`.
        checks: Further options of `validate.py`, to validate the weights that `train.py` validated.
        epochs: Number of epochs.
        updates: Number of optimizer updates in them.
    """
    model: list[str | float]
    options: list[str | float] = field(default_factory=list)
    checks: list[str | float] = field(default_factory=list)
    epochs: int = 1
    updates: int = BATCHES


TRAININGS = {
    'plain': Training(['--model', 'evo_deit_tiny_patch16_224', *SMALL], epochs=8, updates=8 * BATCHES),
    'as_registered': Training(['--model', 'evo_test_vit'], epochs=2, updates=2 * BATCHES),
    'two_heads_mixup_ema_bfloat16_accumulation': Training(
        [
            '--model', 'evo_deit_tiny_patch16_224', '--gp', 'avg', *SMALL, 'class_head=True',
            '--amp', '--amp-dtype', 'bfloat16',
        ],
        [
            '--model-ema', '--model-ema-decay', 0.95, '--grad-accum-steps', 2,
            '--mixup', 0.8, '--cutmix', 1.0, '--drop-path', 0.1, '--clip-grad', 1.0,
        ],
        ['--use-ema'],
        epochs=8,
        updates=8 * BATCHES // 2,
    ),
    'levit': Training(['--model', 'evo_levit_128s', *LEVIT], epochs=4, updates=4 * BATCHES),
    'levit_four_heads_token_distilled': Training(
        ['--model', 'evo_levit_cls_128s', *LEVIT, 'class_head=True'],
        ['--kd-distill-type', 'token', '--kd-model-name', 'local-dir:teacher', '--model-ema', '--drop-path', 0.1],
    ),
    'layer_to_stage': Training(
        ['--model', 'evo_deit_tiny_patch16_224', *SMALL, f'layerwise_updates={2 * BATCHES}'],
        ['--grad-accum-steps', 2, '--model-ema', '--model-ema-decay', 0.5],
        ['--use-ema'],
        epochs=8,
        updates=8 * BATCHES // 2,
    ),
    'levit_layer_to_stage': Training(
        ['--model', 'evo_levit_cls_128s', *LEVIT, 'layerwise_updates=3'], ['--model-ema'], ['--use-ema']),
    'eva02': Training(['--model', 'evo_eva02_tiny_patch14_224', *SMALL]),
    'dinov3': Training(  # dynamic image sizes, registers, and a rotation that is augmented in training
        ['--model', 'evo_vit_small_patch16_dinov3', '--gp', 'avg', '--amp', '--amp-dtype', 'bfloat16', *SMALL,
         f'layerwise_updates={BATCHES}', 'selection=stage', 'rope_rescale_coords=2.'],
        ['--grad-checkpointing']),
    'compiled': Training(
        ['--model', 'evo_deit_tiny_patch16_224', *TINY, f'layerwise_updates={BATCHES}'],
        ['--torchcompile'],
        epochs=2,
        updates=2 * BATCHES,
    ),
}
STUDENTS = {
    'deit': ['--model', 'evo_deit_tiny_patch16_224', *SMALL],
    'deit_two_heads': ['--model', 'evo_deit_tiny_patch16_224', '--gp', 'avg', *SMALL, 'class_head=True'],
    'deit_distilled': ['--model', 'evo_deit_tiny_distilled_patch16_224', *SMALL],
    'levit': ['--model', 'evo_levit_128s', *LEVIT],
}
for student, model in STUDENTS.items():
    for distill_type in ('logit', 'feature', 'token'):
        if (student, distill_type) != ('deit', 'token'):  # one head can't learn from a token of its own
            TRAININGS[f'{student}_{distill_type}_distilled'] = Training(
                model, ['--kd-distill-type', distill_type, '--kd-model-name', 'local-dir:teacher'])
NEEDS_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ('g++', 'clang++'))), reason='torch.compile on a CPU needs a C++ compiler')
EACH_TRAINING = pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[NEEDS_COMPILER] if name == 'compiled' else []) for name in TRAININGS])


@dataclass
class Run:
    """What a finished `train.py` has left."""
    training: Training
    folder: Path

    @property
    def summary(self) -> list[dict[str, str]]:
        with open(self.folder / 'summary.csv', newline='') as file:
            return list(csv.DictReader(file))

    @property
    def top1_top5(self) -> list[float]:
        return [float(self.summary[-1][f'eval_{metric}']) for metric in ('top1', 'top5')]

    @property
    def args(self) -> dict:
        return yaml.safe_load((self.folder / 'args.yaml').read_text())

    @property
    def model(self) -> torch.nn.Module:
        args = self.args
        return timm.create_model(
            args['model'], num_classes=NUM_CLASSES, global_pool=args['gp'], **args['model_kwargs'])

    @property
    def checkpoint(self) -> dict:
        return torch.load(self.folder / 'last.pth.tar', weights_only=False)


class Workplace:
    """A folder with the scripts and images, to call the scripts in."""

    def __init__(self, folder: Path) -> None:
        # copies, because a script imports the `timm` that lies beside it before the installed one
        for script in SCRIPTS:
            shutil.copy(Path(os.environ['TIMM_SCRIPTS']) / script, folder)
        self.folder = folder

    def call(self, script: str, *args, **environment: str) -> str:
        """What the script prints; it must succeed, and this package must not have warned."""
        # one thread each, because waiting threads slow each other down where the machine has other work
        environment = os.environ | {'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'} | environment
        result = subprocess.run(
            [sys.executable, script, *map(str, args)],
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        assert 'Warning: timm-evo' not in result.stderr, result.stderr
        return result.stdout

    def result(self, script: str, *args, **environment: str) -> dict | list:
        """The result that the script prints as JSON."""
        return json.loads(self.call(script, *args, **environment).split('--result\n')[1])

    def train(self, training: Training, experiment: str, *args) -> Run:
        self.call(
            'train.py', *DATA, '--num-classes', NUM_CLASSES, *training.model, *training.options,
            '--epochs', training.epochs, '--warmup-epochs', 0, '--opt', 'adamw', '--lr', 1e-3, '--no-aug',
            '--output', 'output', '--experiment', experiment, *args)
        return Run(training, self.folder / 'output' / experiment)


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits as an image folder."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for digit in range(NUM_CLASSES):
        of_digit = digits.images[digits.target == digit]
        for i, pixels in enumerate(of_digit[:2 * IMAGES_PER_CLASS]):
            file = folder / ('train' if i < IMAGES_PER_CLASS else 'validation') / str(digit) / f'{i:02d}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15).astype('uint8')).resize((32, 32)).convert('RGB').save(file)


def copy_images(source: Path, folder: Path) -> None:
    """Copy a few images of a few classes from an image folder."""
    evaluation = next(name for name in ('validation', 'val', 'test') if (source / name).is_dir())
    classes = sorted(path.name for path in (source / 'train').iterdir() if path.is_dir())[:NUM_CLASSES]
    for split, name in (('train', 'train'), ('validation', evaluation)):
        for class_name in classes:
            (folder / split / class_name).mkdir(parents=True)
            for file in sorted((source / name / class_name).iterdir())[:IMAGES_PER_CLASS]:
                shutil.copy(file, folder / split / class_name)


@pytest.fixture(scope='module')
def workplace(tmp_path_factory) -> Workplace:
    folder = tmp_path_factory.mktemp('timm_scripts')
    if 'TIMM_EVO_IMAGES' in os.environ:
        copy_images(Path(os.environ['TIMM_EVO_IMAGES']), folder / 'images')
    else:
        write_digits(folder / 'images')
    teacher_args = dict(img_size=32, patch_size=8, embed_dim=64, num_heads=2, depth=2, dynamic_img_size=True)
    teacher = timm.create_model('deit_tiny_patch16_224', num_classes=NUM_CLASSES, **teacher_args)
    save_for_hf(teacher, folder / 'teacher', model_args=teacher_args)
    return Workplace(folder)


@pytest.fixture(scope='module')
def trained(workplace) -> Callable[[str], Run]:
    """Trains once for all tests of the same training."""
    runs = {}

    def trained(name: str) -> Run:
        if name not in runs:
            runs[name] = workplace.train(TRAININGS[name], name)
        return runs[name]

    return trained


@EACH_TRAINING
def test_train_writes_losses_and_a_checkpoint_of_the_evolved_model(trained, name):
    run = trained(name)
    assert [row['epoch'] for row in run.summary] == [str(epoch) for epoch in range(run.training.epochs)]
    assert all(math.isfinite(float(value)) for row in run.summary for value in row.values())
    assert run.args['model'].startswith('evo_')
    assert run.checkpoint['state_dict'].keys() == run.model.state_dict().keys()


@EACH_TRAINING
def test_train_updates_every_parameter(trained, name):
    run = trained(name)
    updates = [int(state['step']) for state in run.checkpoint['optimizer']['state'].values()]
    assert set(updates) == {run.training.updates}
    # feature distillation trains a projection between features of different widths, too
    assert len(updates) - len(list(run.model.parameters())) == (2 if name == 'levit_feature_distilled' else 0)


def test_train_resumes_at_the_next_epoch(workplace, trained):
    run = trained('plain')
    resumed = workplace.train(run.training, 'resumed', '--resume', 'output/plain/checkpoint-5.pth.tar')
    epochs, resumed_epochs = ([(row['epoch'], row['lr']) for row in r.summary] for r in (run, resumed))
    assert resumed_epochs == epochs[6:]
    updates = {int(state['step']) for state in resumed.checkpoint['optimizer']['state'].values()}
    assert updates == {run.training.updates}


@pytest.mark.parametrize('name', [name for name in TRAININGS if 'layer_to_stage' in name or name == 'compiled'])
def test_train_counts_its_updates_for_the_averaged_weights_too(trained, name):
    if name == 'compiled' and not any(map(shutil.which, ('g++', 'clang++'))):
        pytest.skip('torch.compile on a CPU needs a C++ compiler')
    run = trained(name)
    for weights in ('state_dict', 'state_dict_ema'):
        if weights == 'state_dict' or '--model-ema' in run.training.options:
            assert run.checkpoint[weights]['num_updates'] == run.training.updates


@pytest.mark.parametrize('epoch', [2, 5], ids=['layer', 'stage'])
def test_train_resumes_counting(workplace, trained, epoch):
    run = trained('layer_to_stage')
    resumed = workplace.train(
        run.training, f'counted_{epoch}', '--resume', f'output/layer_to_stage/checkpoint-{epoch}.pth.tar')
    assert len(resumed.summary) == run.training.epochs - epoch - 1
    for weights in ('state_dict', 'state_dict_ema'):
        assert resumed.checkpoint[weights]['num_updates'] == run.training.updates


@pytest.mark.parametrize('name, option', [
    ('plain', []),
    ('layer_to_stage', []),
    ('levit_layer_to_stage', []),
    ('two_heads_mixup_ema_bfloat16_accumulation', []),
    ('levit', []),
    ('levit', ['--reparam']),
    ('eva02', []),
    ('dinov3', []),
])
def test_validate_agrees_with_train(workplace, trained, name, option):
    run = trained(name)
    result = workplace.result(
        'validate.py', *DATA, '--num-classes', NUM_CLASSES, *run.training.model, *run.training.checks,
        '--checkpoint', f'output/{name}/last.pth.tar', *option)
    assert [result['top1'], result['top5']] == pytest.approx(run.top1_top5, abs=1e-3)


def test_validate_takes_wildcards_and_the_weights_of_the_dense_twin_from_the_hub(workplace, trained, tmp_path):
    run = trained('as_registered')
    weights = run.checkpoint['state_dict']
    others = 1000 - NUM_CLASSES  # the published weights have ImageNet's classes, the images here only a few
    weights['head.weight'] = torch.cat([weights['head.weight'], weights['head.weight'].new_zeros(others, 64)])
    weights['head.bias'] = torch.cat([weights['head.bias'], weights['head.bias'].new_full((others,), -100.)])
    # as the Hub's client stores what it has downloaded
    repository = tmp_path / f'models--{timm.get_pretrained_cfg("test_vit").hf_hub_id.replace("/", "--")}'
    revision = '0' * 40
    for folder in (repository / 'refs', repository / 'snapshots' / revision):
        folder.mkdir(parents=True)
    (repository / 'refs' / 'main').write_text(revision)
    save_file(weights, repository / 'snapshots' / revision / 'model.safetensors')

    results = workplace.result('validate.py', *DATA, '--model', '*test_vit', HF_HUB_CACHE=str(tmp_path))
    results = {result['model']: result for result in results}
    assert results.keys() == {'evo_test_vit.r160_in1k', 'test_vit.r160_in1k'}
    evolved = results['evo_test_vit.r160_in1k']
    assert [evolved['top1'], evolved['top5']] == pytest.approx(run.top1_top5, abs=1e-3)


@pytest.mark.parametrize('model', ['evo_test_vit', 'evo_levit_128s'])
def test_benchmark_measures_inference_and_training(workplace, model):
    result = workplace.result(
        'benchmark.py', '--model', model, '--bench', 'both', '--device', 'cpu',
        '--batch-size', 2, '--num-warm-iter', 1, '--num-bench-iter', 5)
    assert result['model'] == model and 'error' not in result
    assert result['infer_samples_per_sec'] > 0 and result['train_samples_per_sec'] > 0
    assert result.get('infer_gmacs', 1) > 0  # only with a profiler installed


@pytest.mark.skipif(not find_spec('fvcore'), reason='benchmark.py profiles with fvcore, which is not installed')
def test_benchmark_profiles_less_work_than_the_dense_twin_has(workplace):
    def gmacs(model: str) -> float:
        result = workplace.result('benchmark.py', '--model', model, '--bench', 'profile-fvcore', '--device', 'cpu')
        return result['infer_gmacs']

    assert 0 < gmacs('evo_deit_tiny_patch16_224') < gmacs('deit_tiny_patch16_224') / 1.4


@pytest.mark.skipif(not find_spec('pandas'), reason='inference.py needs pandas, which is not installed')
def test_inference_writes_a_prediction_for_every_image(workplace, trained):
    run = trained('plain')
    workplace.call(
        'inference.py', *DATA, '--num-classes', NUM_CLASSES, *run.training.model,
        '--checkpoint', 'output/plain/last.pth.tar', '--label-type', 'none', '--include-index', '--fullname',
        '--results-dir', 'output', '--results-file', 'predictions.csv')
    with open(workplace.folder / 'output' / 'predictions.csv', newline='') as file:
        predictions = {row['filename']: int(row['index']) for row in csv.DictReader(file)}

    images = workplace.folder / 'images' / 'validation'
    classes = sorted(path.name for path in images.iterdir())
    assert predictions.keys() == {path.relative_to(images).as_posix() for path in images.glob('*/*')}
    correct = [classes[index] == Path(name).parent.name for name, index in predictions.items()]
    assert 100 * sum(correct) / len(correct) == pytest.approx(run.top1_top5[0], abs=1e-3)


@pytest.fixture(scope='module', params=[[], ['--dynamo']], ids=['torchscript', 'dynamo'])
def onnx_file(workplace, trained, request) -> str:
    trained('as_registered')
    file = f'evo_test_vit{"".join(request.param)}.onnx'
    workplace.call(
        'onnx_export.py', file, '--model', 'evo_test_vit', '--num-classes', NUM_CLASSES,
        '--checkpoint', 'output/as_registered/last.pth.tar', *request.param)
    return file


def test_exported_onnx_gives_the_logits_of_the_model(workplace, trained, onnx_file):
    import onnxruntime

    run = trained('as_registered')
    model = run.model.eval()
    model.load_state_dict(run.checkpoint['state_dict'])
    images = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(workplace.folder / onnx_file, providers=['CPUExecutionProvider'])
    logits, = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize('onnx_file', [[]], ids=['torchscript'], indirect=True)
def test_onnx_validate_agrees_with_train(workplace, trained, onnx_file):
    # the script knows no model, so it has to be told the model's preprocessing
    output = workplace.call(
        'onnx_validate.py', 'images', '--onnx-input', onnx_file, '--batch-size', BATCH_SIZE, '--workers', 0,
        '--img-size', 160, '--crop-pct', 0.95, '--interpolation', 'bicubic',
        '--mean', 0.5, 0.5, 0.5, '--std', 0.5, 0.5, 0.5)
    top1_top5 = [float(value) for value in re.findall(r'Prec@\d ([\d.]+)', output.splitlines()[-1])]
    assert top1_top5 == pytest.approx(trained('as_registered').top1_top5, abs=1e-3)


def test_a_converted_checkpoint_of_the_authors_is_trained_on_and_validated(workplace):
    reference = Reference('evo_deit_a')
    weights = reference.group('state.')  # of seven classes
    weights['head.weight'] = torch.cat([weights['head.weight'], torch.zeros(3, 24)])
    weights['head.bias'] = torch.cat([weights['head.bias'], torch.zeros(3)])
    torch.save({'model': weights}, workplace.folder / 'official.pth')
    shape = ['img_size=64', 'patch_size=8', 'embed_dim=24', 'depth=12', 'num_heads=3']
    cli.main([
        'convert', str(workplace.folder / 'official.pth'), '--model', 'evo_deit_tiny_patch16_224',
        '--output', str(workplace.folder / 'converted'), '--model-kwargs', *shape])

    model = ['--model', 'evo_deit_tiny_patch16_224', '--gp', 'avg', '--img-size', 64,
             '--model-kwargs', *shape, 'fast_update=False']
    by_weights = workplace.result(
        'validate.py', *DATA, '--num-classes', NUM_CLASSES, *model, '--checkpoint', 'converted/model.safetensors')
    by_folder = workplace.result('validate.py', *DATA, '--model', 'local-dir:converted', '--pretrained')
    assert by_weights['top1'] == by_folder['top1'] and by_weights['top5'] == by_folder['top5']
    run = workplace.train(Training(model, ['--initial-checkpoint', 'converted/model.safetensors']), 'continued')
    # one epoch has not led far from where it started
    before, after = (
        state_dict['blocks.0.attn.qkv.weight'].flatten()
        for state_dict in (load_file(workplace.folder / 'converted/model.safetensors'), run.checkpoint['state_dict']))
    assert not torch.equal(before, after) and torch.cosine_similarity(before, after, dim=0) > 0.9
