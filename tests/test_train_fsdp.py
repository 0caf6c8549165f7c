"""`examples/train_fsdp.py` by torchrun: killed and resumed, on the same and on another number of processes.

The processes of a run fork from one that has imported everything, which takes most of the time of such a short run.
The slow ones are started as a user does it.
"""
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

psutil = pytest.importorskip('psutil')
pytest.importorskip('tqdm')
if not hasattr(pytest.importorskip('torch.distributed.fsdp'), 'fully_shard'):
    pytest.skip('this torch has FSDP2 elsewhere', allow_module_level=True)

SCRIPT = Path(__file__).parents[1] / 'examples' / 'train_fsdp.py'
TORCHRUN = ['-m', 'torch.distributed.run']
FORKED = [
    '-c',
    'import timm, torchvision, torch.distributed.checkpoint.state_dict, torch.distributed.fsdp\n'
    'from torch.distributed.run import main\nmain()',
    '--run-path', '--start-method', 'fork',
]
MODEL = 'evo_deit_tiny_patch16_224'
MODEL_ARGS = dict(
    img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=4, start_block=1, stage_depth=2, layerwise_updates=11)
UPDATES = 18  # 3 in an epoch: 39 images, of which 36 have their turn, in another order each epoch
OPTIONS = [
    '--model', MODEL, '--batch-size', '12', '--epochs', '6', '--save-every', '5', '--lr', '5e-3', '--clip-grad', '1',
    '--transform-kwargs', 'auto_augment=rand-m9-inc1', 're_prob=0.25',
    '--mixup-kwargs', 'mixup_alpha=0.8', 'cutmix_alpha=1.0', '--scheduler-kwargs', 'warmup_epochs=1',
    '--model-kwargs', *(f'{name}={value}' for name, value in MODEL_ARGS.items()),
]


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    folder, random = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for i in range(39):
        file = folder / 'train' / 'abc'[i % 3] / f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 200, (32, 32, 3), dtype=np.uint8)
        pixels[..., i % 3] += 55  # so that there is something to learn
        Image.fromarray(pixels).save(file)
    return folder


def start(processes: int, images: Path, output: Path, *options: str, launcher: list[str] = FORKED) -> subprocess.Popen:
    command = [
        sys.executable, *launcher, '--standalone', '--nproc_per_node', str(processes), str(SCRIPT),
        '--data-dir', str(images), '--output', str(output), '--workers', '0', *options]
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'HF_HUB_OFFLINE': '1'}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(*args, **kwargs) -> None:
    process = start(*args, **kwargs)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed


def read(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / 'losses.jsonl').read_text().splitlines()]


def losses(output: Path) -> list[float]:
    """The loss of each update, where it was made twice of the last time."""
    last = {line['update']: line['loss'] for line in read(output)}
    assert list(last) == list(range(1, UPDATES + 1))
    return list(last.values())


@pytest.fixture(scope='module')
def uninterrupted(images, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp('uninterrupted')
    run(2, images, output, *OPTIONS)
    return output


@pytest.fixture(scope='module')
def killed(images, tmp_path_factory) -> Path:
    """What is left after SIGKILL for all processes, some updates after a checkpoint and before the schedule changes."""
    output = tmp_path_factory.mktemp('killed')
    process = start(2, images, output, *OPTIONS)
    log = output / 'losses.jsonl'
    while process.poll() is None and not (log.exists() and log.read_text().count('\n') > 6):
        time.sleep(0.01)
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.send_signal(signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, printed
    assert 6 < len(read(output)) < UPDATES
    (output / 'unfinished').mkdir(exist_ok=True)  # as if it had been writing a checkpoint
    (output / 'unfinished' / '__3_0.distcp').write_text('half a file')
    return output


@pytest.fixture(scope='module', params=[2, pytest.param(3, marks=pytest.mark.slow)])
def resumed(request, images, killed, tmp_path_factory) -> tuple[int, Path, Path]:
    output = tmp_path_factory.mktemp('resumed') / 'output'
    shutil.copytree(killed, output)
    run(request.param, images, output, *OPTIONS, '--workers', str(request.param - 2))
    return request.param, output


def test_losses_after_a_kill_are_those_of_a_run_that_was_not_killed(uninterrupted, resumed):
    processes, output = resumed
    if processes == 2:
        assert losses(output) == losses(uninterrupted)
    else:
        assert losses(output) == pytest.approx(losses(uninterrupted), rel=0, abs=1e-4)
    assert max(losses(output)) - min(losses(output)) > 0.05  # they do differ from update to update


def test_it_resumes_from_the_newest_whole_checkpoint(killed, resumed):
    _, output = resumed
    newest = max(int(path.name) for path in killed.glob('[0-9]*'))
    assert newest >= 5
    updates = [line['update'] for line in read(output)]
    assert updates == [line['update'] for line in read(killed)] + list(range(newest + 1, UPDATES + 1))
    assert {path.name for path in output.iterdir()} == {'losses.jsonl', '00000015', '00000018'}


def test_every_run_changes_from_layer_to_stage_at_the_same_update(uninterrupted, resumed):
    for output in (uninterrupted, resumed[1]):
        for line in read(output):
            assert line['selections'] == (3 if line['update'] <= MODEL_ARGS['layerwise_updates'] else 2)


def test_a_checkpoint_becomes_a_file_that_timm_loads(uninterrupted, resumed, tmp_path):
    weights = []
    for output in (uninterrupted, resumed[1]):
        dcp_to_torch_save(output / f'{UPDATES:08}', tmp_path / 'weights.pth')
        model = timm.create_model(MODEL, num_classes=3, checkpoint_path=tmp_path / 'weights.pth', **MODEL_ARGS)
        assert int(model.num_updates) == UPDATES
        weights.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=0 if resumed[0] == 2 else 1e-3)


# Errors

@pytest.fixture
def call(images, tmp_path, monkeypatch, capsys):
    """Gives what the script says, in this process, as the only one of a run or the first of several."""
    spec = importlib.util.spec_from_file_location('train_fsdp', SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, 'DEVICE', 'cpu')
    environment = dict(RANK='0', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')

    def call(processes: int | None, *options: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if processes:
            monkeypatch.setenv('WORLD_SIZE', str(processes))
        monkeypatch.setattr(
            sys, 'argv', [str(SCRIPT), '--data-dir', str(images), '--output', str(tmp_path), *OPTIONS, *options])
        try:
            with pytest.raises(SystemExit) as end:
                script.main()
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return f'{capsys.readouterr().err}{end.value}'

    return call


@pytest.mark.parametrize('processes, options, message', [
    (None, [], 'start this with torchrun'),
    (5, [], '--batch-size must be a multiple of 10, and at most the 39 images'),
    (2, ['--batch-size', '40'], '--batch-size must be a multiple of 4, and at most the 39 images'),
    (2, ['--data-dir', 'nowhere'], 'there is no nowhere/train'),
    (2, ['--model', 'test_resnet', '--model-kwargs'], '--model must be a ViT, but test_resnet has no blocks'),
])
def test_a_wrong_argument_is_refused_with_the_reason(call, processes, options, message):
    assert message in call(processes, *options)


def test_other_arguments_than_those_of_the_checkpoint_are_refused(call, uninterrupted):
    assert 'has lr = 0.005, not 0.1. Use another --output' in call(1, '--output', str(uninterrupted), '--lr', '0.1')


@pytest.mark.slow
@pytest.mark.parametrize('option', ['--compile', '--grad-checkpointing'])
def test_it_trains_compiled_and_with_checkpointing(images, uninterrupted, tmp_path, option):
    run(2, images, tmp_path, *OPTIONS, option, launcher=TORCHRUN)
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted), rel=0, abs=1e-3)


@pytest.mark.slow
def test_it_trains_in_half_precision(images, tmp_path):
    """At a tenth of the learning rate: at that of the other tests what rounding does grows from update to update, with
    all tokens kept, too."""
    for name, option in [('float32', []), ('bfloat16', ['--bfloat16'])]:
        run(2, images, tmp_path / name, *OPTIONS, '--lr', '5e-4', *option, launcher=TORCHRUN)
    assert losses(tmp_path / 'bfloat16') == pytest.approx(losses(tmp_path / 'float32'), rel=0, abs=5e-3)
    assert losses(tmp_path / 'bfloat16') != losses(tmp_path / 'float32')
