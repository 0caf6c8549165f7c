"""`examples/embed_images.py` on a Ray of its own: killed with all its processes in the middle, and called again.

All that starts Ray takes long, and has the mark slow.
What Ray's processes leave is in a folder of their own, by which those that a test leaves behind are found and killed.
"""
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from filelock import FileLock
from loopback_hub import LoopbackHub
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.utils import random_seed

from timm_evo import hub

psutil = pytest.importorskip('psutil')
pytest.importorskip('ray.data')
pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')

SCRIPT = Path(__file__).parents[1] / 'examples' / 'embed_images.py'
MODEL = 'evo_deit_tiny_patch16_224'
MODEL_ARGS = dict(
    img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=4, start_block=1, stage_depth=2, num_classes=5)
OPTIONS = [
    '--model', MODEL, '--batch-size', '8', '--save-every', '16', '--actors', '1', '--model-kwargs',
    *(f'{name}={value}' for name, value in MODEL_ARGS.items())]
UNREADABLE = {
    'empty.jpg': 'UnidentifiedImageError: cannot identify image file',
    'text.jpg': 'UnidentifiedImageError: cannot identify image file',
    'truncated.jpg': 'OSError: image file is truncated',
}


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> Path:
    """In folders of classes; large ones, so that it takes a while to read them."""
    folder, random = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for i in range(120):
        file = folder / 'abc'[i % 3] / 'more' / f'{i}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((1000, 900)).save(file)
    (folder / 'a/empty.jpg').touch()
    (folder / 'b/text.jpg').write_text('no image')
    (folder / 'truncated.jpg').write_bytes((folder / 'a/more/0.jpg').read_bytes()[:-2000])
    return folder


@pytest.fixture(scope='module')
def expected(images) -> dict[str, tuple]:
    random_seed(0)
    return embed_in_a_loop(timm.create_model(MODEL, **MODEL_ARGS).eval(), images)


def embed_in_a_loop(model: torch.nn.Module, images: Path) -> dict[str, tuple]:
    """Features, prediction and probability of each image that can be read, one by one."""
    transform = create_transform(**resolve_data_config(MODEL_ARGS, model=model))
    result = {}
    with torch.inference_mode():
        for file in images.glob('*/more/*.jpg'):
            image = transform(Image.open(file).convert('RGB'))[None]
            features = model.forward_head(model.forward_features(image), pre_logits=True)
            probability, prediction = model(image).softmax(-1).max(-1)
            result[str(file)] = features[0].numpy(), prediction.item(), probability.item()
    return result


@pytest.fixture(scope='module')
def ray_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix='ray'))  # a short name, as it is part of those of sockets
    yield folder
    for _ in range(100):
        left = [each for each in psutil.process_iter() if belongs(each, folder)]
        for each in left:
            each.kill()
        if not left:
            break
        time.sleep(0.1)
    shutil.rmtree(folder)


def belongs(process, folder: Path) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and (
            str(folder) in ' '.join(process.cmdline()) or process.environ().get('RAY_TMPDIR') == str(folder))
    except psutil.Error:
        return False


def start(ray_folder: Path, data: Path, output: Path, *options: str, address: str = 'local') -> subprocess.Popen:
    environment = os.environ | {
        'RAY_ADDRESS': address, 'RAY_TMPDIR': str(ray_folder), 'CUDA_VISIBLE_DEVICES': ''}
    command = [sys.executable, str(SCRIPT), '--data', str(data), '--output', str(output), *OPTIONS, *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    try:
        printed, _ = process.communicate(timeout=300)
    finally:
        kill(process)
    assert process.returncode == 0, printed
    return printed


def kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            try:
                each.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                pass


def read(output: Path) -> list[dict]:
    return pq.read_table(output / 'features').to_pylist()


def check(rows: list[dict], expected: dict[str, tuple]) -> None:
    assert sorted(row['id'] for row in rows) == sorted(expected)
    for row in rows:
        features, prediction, probability = expected[row['id']]
        np.testing.assert_allclose(row['features'], features, rtol=0, atol=1e-5)
        assert (row['prediction'], row['probability']) == (prediction, pytest.approx(probability, abs=1e-5))


@pytest.fixture(scope='module')
def killed(images, ray_folder, tmp_path_factory) -> Path:
    """What is left after SIGKILL for the script and all of Ray when the first files were there."""
    output = tmp_path_factory.mktemp('killed')
    process = start(ray_folder, images, output)
    try:
        while process.poll() is None and not any(map(is_whole, output.glob('features/*.parquet'))):
            time.sleep(0.005)
    finally:
        kill(process)
    assert process.wait() == -signal.SIGKILL, process.communicate()[0]
    return output


@pytest.fixture(scope='module')
def resumed(images, killed, ray_folder, tmp_path_factory) -> tuple[Path, str]:
    """After the same command, with a file that was half written when everything was killed."""
    output = tmp_path_factory.mktemp('resumed') / 'output'
    shutil.copytree(killed, output)
    whole = next(file for file in output.glob('features/*.parquet') if is_whole(file))
    whole.with_name('half.parquet').write_bytes(whole.read_bytes()[:-20])
    return output, finish(start(ray_folder, images, output))


def is_whole(file: Path) -> bool:
    try:
        return bool(pq.read_metadata(file))
    except pa.ArrowInvalid:
        return False


@pytest.mark.slow
def test_a_killed_run_continues_and_writes_each_image_once_as_a_plain_loop_does(expected, killed, resumed):
    output, _ = resumed
    before = {file.name: file.read_bytes() for file in killed.glob('features/*.parquet') if is_whole(file)}
    assert 0 < sum(pq.read_metadata(killed / 'features' / name).num_rows for name in before) < len(expected)
    check(read(output), expected)
    for name, content in before.items():  # those were not done again
        assert (output / 'features' / name).read_bytes() == content


@pytest.mark.slow
def test_features_are_lists_of_one_size_that_need_no_ray_to_be_read(resumed):
    schema = pq.read_schema(next((resumed[0] / 'features').iterdir()))
    assert schema.remove_metadata() == pa.schema({
        'id': pa.string(), 'features': pa.list_(pa.float32(), 32), 'prediction': pa.int64(),
        'probability': pa.float32()})


@pytest.mark.slow
def test_unreadable_images_are_named_with_the_reason_and_left_out(images, resumed):
    output, printed = resumed
    lines = dict(line.split('\t') for line in (output / 'unreadable.txt').read_text().splitlines())
    assert {Path(path).name for path in lines} == set(UNREADABLE)
    for path, reason in lines.items():
        assert Path(path).is_file() and path.startswith(str(images))
        assert reason.startswith(UNREADABLE[Path(path).name])
        assert f'unreadable: {path}\t{reason}\n' in printed
    assert '120 images are in' in printed and '3 are unreadable' in printed


# Errors

@pytest.fixture
def call(images, tmp_path, monkeypatch, capsys):
    """Gives what the script says before it starts Ray."""
    spec = importlib.util.spec_from_file_location('embed_images', SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def call(*options: str) -> str:
        monkeypatch.setattr(
            sys, 'argv', [str(SCRIPT), '--data', str(images), '--output', str(tmp_path / 'output'), *OPTIONS, *options])
        with pytest.raises(SystemExit) as end:
            script.main()
        return f'{capsys.readouterr().err}{end.value}'

    return call


@pytest.fixture
def table(tmp_path) -> Path:
    pq.write_table(pa.table({'image': [b'', b''], 'name': ['a', 'a'], 'label': [1, 2]}), tmp_path / 'table.parquet')
    return tmp_path / 'table.parquet'


@pytest.mark.parametrize('options, message', [
    (['--batch-size', '0'], '--batch-size must be at least 1, not 0'),
    (['--data', 'nowhere'], '--data must be folders, or .parquet files that exist, but nowhere is neither'),
    (['--data', 'TABLE', '--image-column', 'pixels'], '--image-column must be one of image, name, label of '),
    (['--data', 'TABLE', '--image-column', 'label'], '--image-column must have bytes or {bytes, path}, but label has'),
    (['--data', 'TABLE', '--id-column', 'name'], '--id-column must have each id once, but it has a more than once'),
])
def test_a_wrong_argument_is_refused_with_the_reason(call, table, options, message):
    assert message in call(*(option.replace('TABLE', str(table)) for option in options))


def test_a_folder_that_is_there_twice_is_refused(call, images):
    assert f'must have each id once, but it has {images}/a/' in call('--data', str(images), str(images / 'a'))


@pytest.mark.slow
@pytest.mark.parametrize('options, name', [
    (['--bfloat16'], 'bfloat16'), (['--model-kwargs', 'img_size=32'], 'model_kwargs'), (['--data', 'OTHER'], 'data')])
def test_other_settings_than_those_of_the_run_before_are_refused(call, images, resumed, options, name):
    options = [option.replace('OTHER', str(images / 'a')) for option in options]
    message = call('--output', str(resumed[0]), *options)
    assert f'has {name} = ' in message and 'Use another --output' in message


@pytest.mark.slow
def test_other_weights_than_those_of_the_run_before_are_refused(call, resumed, tmp_path):
    settings = json.loads((resumed[0] / 'settings.json').read_text()) | {'weights': 'of another file of the same name'}
    (tmp_path / 'output').mkdir()
    (tmp_path / 'output' / 'settings.json').write_text(json.dumps(settings))
    assert 'has weights = of another file' in call()


def test_an_output_that_another_run_writes_to_is_refused(call, tmp_path):
    (tmp_path / 'output').mkdir()
    (tmp_path / 'output' / 'settings.json').write_text('{}')
    with FileLock(tmp_path / 'output' / 'lock'):
        assert f'{tmp_path}/output is in use by another run.' in call()


# What takes longer

@pytest.mark.slow
@pytest.mark.parametrize('who', ['MapWorker(MapBatches(Embed))', 'decode'])
def test_when_a_process_is_killed_the_run_continues_without_it(images, expected, ray_folder, tmp_path, who):
    process, killed = start(ray_folder, images, tmp_path / 'output'), []
    try:
        while process.poll() is None and not killed:
            for each in psutil.Process(process.pid).children(recursive=True):
                try:
                    if who in ' '.join(each.cmdline()) and (who == 'decode' or list(tmp_path.glob('*/*/*.parquet'))):
                        each.kill()
                        killed.append(each.pid)
                        break
                except psutil.NoSuchProcess:
                    pass
            time.sleep(0.005)
        finish(process)
    finally:
        kill(process)
    assert killed
    check(read(tmp_path / 'output'), expected)


@pytest.fixture
def nodes(ray_folder, monkeypatch) -> Iterator[list]:
    """Two of 2 CPUs, on this machine."""
    monkeypatch.setenv('RAY_TMPDIR', str(ray_folder))
    monkeypatch.setenv('RAY_USAGE_STATS_ENABLED', '0')
    cluster = pytest.importorskip('ray.cluster_utils').Cluster()
    options = {'num_cpus': 2, 'object_store_memory': 200 << 20}
    try:
        yield [cluster.add_node(include_dashboard=False, **options), cluster.add_node(**options)]
    finally:
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize('what', ['an actor', 'a node'])
def test_when_an_actor_or_a_node_of_two_is_killed_the_other_does_its_part(
        images, expected, nodes, ray_folder, tmp_path, what):
    output = tmp_path / 'output'
    process = start(ray_folder, images, output, '--actors', '2', address=nodes[0].address)
    try:
        while process.poll() is None and not list(output.glob('features/*.parquet')):
            time.sleep(0.005)
        raylets = [psutil.Process(node.all_processes['raylet'][0].process.pid) for node in nodes]
        actors = [[each for each in raylet.children(recursive=True) if 'Embed' in ' '.join(each.cmdline())]
                  for raylet in raylets]
        assert [len(each) for each in actors] == [1, 1]
        for each in actors[1] if what == 'an actor' else [raylets[1], *raylets[1].children(recursive=True)]:
            each.kill()
        finish(process)
    finally:
        kill(process)
    check(read(output), expected)


@pytest.mark.slow
@pytest.mark.parametrize('named', [True, False])
def test_parquet_files_of_bytes_and_of_datasets_structs_have_stable_ids(images, expected, ray_folder, tmp_path, named):
    files = sorted(map(Path, expected))[:40]
    for part in range(2):
        content = [file.read_bytes() for file in files[part::2]]
        column = content if named else [{'bytes': each, 'path': 'image.jpg'} for each in content]
        pq.write_table(
            pa.table({'image': column, 'name': [str(file) for file in files[part::2]]}), tmp_path / f'{part}.parquet',
            row_group_size=7)
    options = ['--data', *(str(tmp_path / f'{part}.parquet') for part in range(2))]
    options += ['--id-column', 'name'] if named else []
    finish(start(ray_folder, images, tmp_path / 'output', *options))
    first = read(tmp_path / 'output')
    if named:
        check(first, {str(file): expected[str(file)] for file in files})
    features = np.array(sorted(row['features'] for row in first))
    np.testing.assert_allclose(features, sorted(expected[str(file)][0].tolist() for file in files), atol=1e-5)
    lost = sorted((tmp_path / 'output' / 'features').iterdir())[0]
    lost.unlink()  # as if a run had been killed before it
    finish(start(ray_folder, images, tmp_path / 'output', *options))
    again = {row['id']: row for row in read(tmp_path / 'output')}
    assert again.keys() == {row['id'] for row in first} and len(again) == 40
    for row in first:
        np.testing.assert_allclose(again[row['id']]['features'], row['features'], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('source', ['the Hub', 'a file'])
def test_a_model_and_its_weights_come_from_the_hub_or_weights_from_a_file(
        images, ray_folder, tmp_path, monkeypatch, source):
    torch.manual_seed(1)
    model = timm.create_model(MODEL, **MODEL_ARGS).eval()
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    hub.save(model, tmp_path / 'saved')
    with LoopbackHub() as server:
        server.add('someone/photos', tmp_path / 'saved')
        monkeypatch.setenv('HF_ENDPOINT', server.endpoint)
        monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
        monkeypatch.setenv('HF_HUB_OFFLINE', '0')
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')
        options = ['--checkpoint', str(tmp_path / 'weights.pth')]
        if source == 'the Hub':
            options = ['--pretrained', '--model', 'hf-hub:someone/photos', '--model-kwargs', 'img_size=32']
        finish(start(ray_folder, images / 'a', tmp_path / 'output', *options))
    expected = embed_in_a_loop(model, images)
    check(read(tmp_path / 'output'), {name: row for name, row in expected.items() if '/a/' in name})


@pytest.mark.slow
def test_it_embeds_compiled_and_in_half_precision_without_a_head(images, expected, ray_folder, tmp_path):
    options = ['--compile', '--bfloat16', '--model-kwargs']
    options += [f'{name}={value}' for name, value in (MODEL_ARGS | {'num_classes': 0}).items()]
    finish(start(ray_folder, images / 'a', tmp_path / 'output', *options))
    rows = read(tmp_path / 'output')
    assert len(rows) == 40 and rows[0].keys() == {'id', 'features'}
    assert np.isfinite([row['features'] for row in rows]).all()
