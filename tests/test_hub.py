"""Weights come from the Hub and go there: what is asked for, what is cached, and what happens when that goes wrong.

The client is huggingface_hub as it is, in processes of its own, because it reads its environment when it is imported.
The Hub is `loopback_hub.py`. Dense weights are random ones, saved by timm in the files that its repositories have.
"""
import io
import json
import logging
import multiprocessing
import os
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from loopback_hub import HubFile, LoopbackHub, Request
from safetensors.torch import load, load_file
from test_faithful import Reference
from this_torch import load_folder as reload
from this_torch import skip_without_folders
from timm.models import push_to_hf_hub, save_for_hf
from torch import nn

from timm_evo import cli
from timm_evo import hub as evolved_hub
from timm_evo.models import download

REPOSITORY = 'timm/test_vit.r160_in1k'
WEIGHTS = 'model.safetensors'
MEGABYTE = 2 ** 20
ROUND_TRIPS = {
    'evo_test_vit': dict(keep_ratio=0.7, start_block=2, selection='layer', global_pool='avg', class_head=True),
    'evo_deit_tiny_patch16_224': dict(
        img_size=64, depth=6, num_classes=5, keep_ratio=[0.6, 0.4], start_block=2, stage_depth=2, tradeoff=0.3,
        fast_update=False),
    'evo_levit_cls_128s': dict(img_size=128, num_classes=5, keep_ratio=0.7, selection='layer', class_head=True),
}


# What runs in the client's process.

@dataclass
class Pulled:
    """A model that was created, in types that go from process to process."""
    weights: dict[str, np.ndarray]
    architecture: str
    schedule: tuple
    logits: np.ndarray | None


@dataclass
class Failed:
    """An error: its message, and all that the user sees of it."""
    message: str
    shown: str


def no_waits() -> None:
    """The client waits between attempts, up to 24 seconds for each file that it looks for."""
    time.sleep = lambda seconds: None


def pull(name: str, image_size: int | None = None, device: str = 'cpu', **kwargs) -> Pulled | Failed:
    log = logging.StreamHandler(io.StringIO())
    logging.getLogger('huggingface_hub').addHandler(log)
    try:
        with torch.device(device):
            model = timm.create_model(name, pretrained=True, **kwargs).eval()
    except Exception as error:
        return Failed(str(error), log.stream.getvalue() + traceback.format_exc())
    finally:
        logging.getLogger('huggingface_hub').removeHandler(log)
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    logits = image_size and classify(model, image_size).numpy()
    evolved = getattr(model, 'model', model)  # of a feature extractor
    return Pulled(weights, model.pretrained_cfg['architecture'], tuple(evolved.schedule), logits)


def count_checksums(name: str, cache_dir: Path) -> int:
    """How many checksums are computed where a model is created."""
    with mock.patch.object(download, 'sha_fileobj', wraps=download.sha_fileobj) as checksum:
        timm.create_model(name, pretrained=True, cache_dir=cache_dir)
    return checksum.call_count


def arguments(model: nn.Module, name: str) -> dict | None:
    """What a timm that does not note the arguments of its models has to be told."""
    return None if hasattr(model, '_model_args') else ROUND_TRIPS[name]


def push(folder: str, repo_id: str, name: str) -> str:
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    return push_to_hf_hub(model, repo_id, token='hf_anybody', model_args=arguments(model, name)).oid


def push_with_card(folder: str, repo_id: str, name: str) -> str:
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    os.environ['HF_TOKEN'] = 'hf_anybody'
    try:
        return evolved_hub.push(model, repo_id, model_args=arguments(model, name))
    finally:
        del os.environ['HF_TOKEN']


def convert_and_push(checkpoint: str, folder: str, repo_id: str) -> None:
    os.environ['HF_TOKEN'] = 'hf_anybody'
    try:
        cli.main(['convert', checkpoint, '--model', 'evo_deit_tiny_patch16_224', '--output', folder, '--push', repo_id,
                  '--model-kwargs', 'img_size=64', 'patch_size=8', 'embed_dim=24', 'depth=12', 'num_heads=3'])
    finally:
        del os.environ['HF_TOKEN']


def pretrained_names() -> list[str]:
    return timm.list_models('evo_*', pretrained=True)


# What runs here.

@torch.inference_mode()
def classify(model: nn.Module, image_size: int) -> torch.Tensor:
    return model(torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)))


class Client:
    """A process with the client in it; its calls return what the functions above return."""

    def __init__(self, endpoint: str, cache: Path, **environment: str):
        environment = {
            'HF_ENDPOINT': endpoint,
            'HF_HOME': str(cache),
            'HF_HUB_CACHE': str(cache),
            'HF_HUB_OFFLINE': '0',
            'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_DISABLE_PROGRESS_BARS': '1',
            'HF_HUB_DOWNLOAD_TIMEOUT': '20',
            'HF_HUB_ETAG_TIMEOUT': '20',
            'NO_PROXY': '127.0.0.1',
            'no_proxy': '127.0.0.1',
        } | environment
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), initializer=no_waits)
        with mock.patch.dict(os.environ, environment):
            os.environ.pop('HF_TOKEN', None)
            self._pool.submit(os.getpid)  # it starts the process, without waiting for it

    def call(self, function, *args, **kwargs):
        return self._pool.submit(function, *args, **kwargs).result(timeout=120)

    def pull(self, name: str, **kwargs) -> Pulled:
        outcome = self.call(pull, name, **kwargs)
        assert isinstance(outcome, Pulled), outcome.shown
        return outcome

    def fail(self, name: str, **kwargs) -> Failed:
        outcome = self.call(pull, name, **kwargs)
        assert isinstance(outcome, Failed), f'{name} was created'
        return outcome

    def close(self) -> None:
        self._pool.submit(os._exit, 0)  # at once, because torch takes seconds to exit
        self._pool.shutdown()


@pytest.fixture(scope='module')
def processes(tmp_path_factory):
    """The hub, a client, an offline client, and the folder of their caches."""
    caches = tmp_path_factory.mktemp('caches')
    with LoopbackHub() as server:
        online = Client(server.endpoint, caches / 'online')
        offline = Client(server.endpoint, caches / 'offline', HF_HUB_OFFLINE='1')
        yield server, online, offline, caches
        online.close()
        offline.close()


@pytest.fixture
def hub(processes) -> LoopbackHub:
    """An empty, healthy hub."""
    server = processes[0]
    server.repositories.clear()
    server.refusals.clear()
    server.uploads.clear()
    server.log.clear()
    return server


@pytest.fixture
def client(processes, hub) -> Client:
    return processes[1]


def save_random(name: str, folder: Path) -> Path:
    """Files as in timm's repositories, with weights that no model is initialized with."""
    model = timm.create_model(name)
    generator = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.1, 0.2, generator=generator)
    save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.fixture(scope='module')
def dense(tmp_path_factory) -> Path:
    return save_random('test_vit', tmp_path_factory.mktemp('test_vit'))


@pytest.fixture(scope='module')
def dense_levit(tmp_path_factory) -> Path:
    return save_random('levit_128s', tmp_path_factory.mktemp('levit_128s'))


@pytest.fixture
def served(hub, dense) -> HubFile:
    """The weights of the dense twin, in its repository on the hub."""
    return hub.add(REPOSITORY, dense)[WEIGHTS]


def assert_equal(weights: dict[str, np.ndarray], expected: dict[str, torch.Tensor], but: str = '-') -> None:
    assert weights.keys() == expected.keys()
    different = [key for key, value in expected.items() if not np.array_equal(weights[key], value.numpy())]
    assert all(key.startswith(but) for key in different), different


def blobs(cache: Path) -> list[bytes]:
    """Contents of all the files in a cache, unfinished ones included, for which there is no reference."""
    return [path.read_bytes() for path in cache.glob('models--*/blobs/*')]


def asked_for(repo_id: str, *methods: str) -> list[Request]:
    return [Request(method, f'/{repo_id}/resolve/main/{WEIGHTS}') for method in methods]


@pytest.mark.parametrize('name', ['evo_test_vit', 'evo_test_vit.r160_in1k'])
def test_weights_are_those_in_the_repository_of_the_dense_twin(hub, client, served, dense, tmp_path, name):
    pulled = client.pull(name, cache_dir=tmp_path)
    assert_equal(pulled.weights, load_file(dense / WEIGHTS))
    assert hub.requests(REPOSITORY) == asked_for(REPOSITORY, 'HEAD', 'GET')
    assert pulled.architecture == 'evo_test_vit'


@pytest.mark.parametrize('kwargs, initialized', [
    (dict(num_classes=7), 'head.'),
    (dict(in_chans=1), '-'),
    (dict(img_size=192), '-'),
    (dict(features_only=True), '-'),
    (dict(features_only=True, out_indices=(1, 3), img_size=96, in_chans=4), '-'),
], ids=str)
def test_weights_are_adapted_as_the_dense_twin_adapts_them(hub, client, served, dense, tmp_path, kwargs, initialized):
    pulled = client.pull('evo_test_vit', cache_dir=tmp_path, **kwargs)
    twin = timm.create_model(
        'test_vit', pretrained=True, pretrained_cfg_overlay=dict(file=str(dense / WEIGHTS)), **kwargs)
    assert_equal(pulled.weights, twin.state_dict(), but=initialized)
    assert {key: value.shape for key, value in pulled.weights.items()} == {
        key: tuple(value.shape) for key, value in twin.state_dict().items()}
    assert hub.requests(REPOSITORY) == asked_for(REPOSITORY, 'HEAD', 'GET')


def test_weights_are_cached_where_the_environment_says(hub, client, served, dense, processes):
    assert_equal(client.pull('evo_test_vit').weights, load_file(dense / WEIGHTS))
    assert blobs(processes[3] / 'online') == [served.content]


def test_every_tag_asks_for_the_weights_of_its_dense_twin(hub, client, tmp_path):
    names = client.call(pretrained_names)
    assert len(names) >= 14 and 'evo_deit_small_patch16_224.fb_in1k' in names
    # more families would take their time, and their configurations are compared in test_every_vit.py
    for name in [name for name in names if name.startswith(('evo_deit_', 'evo_levit_', 'evo_test_vit.'))]:
        repo_id = f'timm/{name.removeprefix("evo_")}'
        assert timm.get_pretrained_cfg(name.removeprefix('evo_')).hf_hub_id == repo_id
        hub.log.clear()
        failed = client.fail(name, cache_dir=tmp_path, device='meta')  # without the memory of the large ones
        assert [request for request in hub.log if '/resolve/' in request.path] == asked_for(repo_id, 'HEAD')
        assert 'RepositoryNotFoundError' in failed.message and repo_id in failed.message


def test_levit_continues_a_broken_download_where_it_broke(hub, client, dense_levit, tmp_path):
    repo_id = 'timm/levit_128s.fb_dist_in1k'
    file = hub.add(repo_id, dense_levit)[WEIGHTS]
    file.breaks = [12 * MEGABYTE]
    pulled = client.pull('evo_levit_128s', cache_dir=tmp_path)
    assert_equal(pulled.weights, load_file(dense_levit / WEIGHTS))
    assert blobs(tmp_path) == [file.content]
    # the client writes pieces of 10 megabytes, and what it has written it does not ask for again
    assert [request.range for request in hub.requests(repo_id, 'GET')] == [None, f'{10 * MEGABYTE}-']


def test_a_small_file_is_fetched_again_when_the_connection_breaks(hub, client, served, dense, tmp_path):
    served.breaks = [len(served.content) // 2]
    assert_equal(client.pull('evo_test_vit', cache_dir=tmp_path).weights, load_file(dense / WEIGHTS))
    assert blobs(tmp_path) == [served.content]
    assert len(hub.requests(REPOSITORY, 'GET')) == 2


def test_a_second_pull_does_not_download(hub, client, served, dense, tmp_path):
    client.pull('evo_test_vit', cache_dir=tmp_path)
    hub.log.clear()
    assert_equal(client.pull('evo_test_vit', cache_dir=tmp_path).weights, load_file(dense / WEIGHTS))
    assert hub.requests(REPOSITORY) == asked_for(REPOSITORY, 'HEAD')


def test_new_weights_on_the_hub_are_downloaded(hub, client, served, tmp_path):
    client.pull('evo_test_vit', cache_dir=tmp_path)
    changed = served.content[:-4] + np.float32(7).tobytes()
    hub.add(REPOSITORY, {WEIGHTS: changed})
    assert_equal(client.pull('evo_test_vit', cache_dir=tmp_path).weights, load(changed))


def test_weights_that_are_no_safetensors_are_taken_too(hub, client, dense, tmp_path):
    weights = load_file(dense / WEIGHTS)
    file = io.BytesIO()
    torch.save(weights, file)
    hub.add(REPOSITORY, {'pytorch_model.bin': file.getvalue()})
    assert_equal(client.pull('evo_test_vit', cache_dir=tmp_path).weights, weights)
    assert [request.path.rpartition('/')[2] for request in hub.requests(REPOSITORY)] == [
        WEIGHTS, 'pytorch_model.bin', 'pytorch_model.bin']


def test_a_model_without_weights_asks_for_none(hub, client, tmp_path):
    failed = client.fail('evo_levit_cls_128s', cache_dir=tmp_path)
    assert 'the Hugging Face Hub has no weights for it' in failed.message
    assert not [request for request in hub.log if '/resolve/' in request.path]


# What goes wrong on the way, on the hub, or between here and there.

def truncated_on_the_way(file: HubFile) -> None:
    file.sent = file.content[:len(file.content) // 2]


def broken_every_time(file: HubFile) -> None:
    file.breaks = [len(file.content) // 2] * 20


def truncated_on_the_hub(file: HubFile) -> None:
    file.stored = file.content[:len(file.content) // 2]


def garbled_header(file: HubFile) -> None:
    file.stored = b'\xff' * 64 + file.content[64:]


def garbled_tensor(file: HubFile) -> None:
    file.stored = file.content[:-400] + bytes(400)


def heal(file: HubFile) -> None:
    file.stored, file.sent, file.breaks = None, None, []


ON_THE_WAY = [truncated_on_the_way, broken_every_time]
# The client compares what it got with the announced size alone; the checksum is compared here.
BEYOND_THE_CLIENT = [truncated_on_the_hub, garbled_header, garbled_tensor]


@pytest.mark.parametrize('damage', [*ON_THE_WAY, *BEYOND_THE_CLIENT])
def test_damaged_weights_are_an_error_that_names_them_and_are_not_kept(client, served, dense, tmp_path, damage):
    damage(served)
    failed = client.fail('evo_test_vit', cache_dir=tmp_path)
    assert f'evo_test_vit could not be loaded from {REPOSITORY}' in failed.message
    assert ('was damaged and was removed from the cache' in failed.message) == (damage in BEYOND_THE_CLIENT)
    assert blobs(tmp_path) == []
    heal(served)
    assert_equal(client.pull('evo_test_vit', cache_dir=tmp_path).weights, load_file(dense / WEIGHTS))


def test_the_checksum_is_computed_once_after_a_download(hub, client, served, tmp_path):
    assert client.call(count_checksums, 'evo_test_vit', tmp_path) == 1
    assert client.call(count_checksums, 'evo_test_vit', tmp_path) == 0
    hub.add(REPOSITORY, {WEIGHTS: served.content, 'README.md': b'another commit, the same weights'})
    assert client.call(count_checksums, 'evo_test_vit', tmp_path) == 0
    hub.add(REPOSITORY, {WEIGHTS: served.content[:-4] + np.float32(7).tobytes()})
    assert client.call(count_checksums, 'evo_test_vit', tmp_path) == 1


@pytest.mark.parametrize('name', [WEIGHTS, 'pytorch_model.bin'])
def test_weights_that_cannot_be_read_any_more_are_removed_from_the_cache(hub, client, dense, tmp_path, name):
    file = io.BytesIO()
    torch.save(load_file(dense / WEIGHTS), file)
    content = (dense / WEIGHTS).read_bytes() if name == WEIGHTS else file.getvalue()
    hub.add(REPOSITORY, {name: content})
    client.pull('evo_test_vit', cache_dir=tmp_path)
    blob, = tmp_path.glob('models--*/blobs/*')
    blob.write_bytes(content[:len(content) // 2])
    failed = client.fail('evo_test_vit', cache_dir=tmp_path)
    assert 'was damaged and was removed from the cache' in failed.message and REPOSITORY in failed.message
    assert blobs(tmp_path) == []
    assert_equal(client.pull('evo_test_vit', cache_dir=tmp_path).weights, load_file(dense / WEIGHTS))


def test_weights_in_the_store_that_repositories_share_are_checked_and_removed(client, served, dense, tmp_path):
    """Where a newer client keeps a file, and under another name; here it is moved there by hand."""
    client.pull('evo_test_vit', cache_dir=tmp_path)
    blob, = tmp_path.glob('models--*/blobs/*')
    shared = blob.rename(tmp_path / ('0' * 64))
    blob.symlink_to(shared)
    shared.write_bytes(b'damaged')
    assert 'was damaged' in client.fail('evo_test_vit', cache_dir=tmp_path).message
    assert not shared.exists() and not blob.is_symlink()
    assert_equal(client.pull('evo_test_vit', cache_dir=tmp_path).weights, load_file(dense / WEIGHTS))


def test_what_is_wrong_with_a_model_is_not_blamed_on_its_weights(client, served, tmp_path):
    client.pull('evo_test_vit', cache_dir=tmp_path)
    assert client.fail('evo_test_vit', cache_dir=tmp_path, keep_ratio=2).message.startswith('keep_ratio=2')
    failed = client.fail('evo_test_vit', cache_dir=tmp_path, depth=5)
    assert 'Error(s) in loading state_dict' in failed.message and 'Hugging Face' not in failed.message


REFUSALS = pytest.mark.parametrize('status, what, kind', [
    (404, 'missing', 'RepositoryNotFoundError'),
    (401, 'missing', 'RepositoryNotFoundError'),  # the Hub's answer to the anonymous
    (401, 'gated', 'GatedRepoError'),
    (403, 'gated', 'GatedRepoError'),
])


@REFUSALS
def test_a_refusal_is_an_error_that_names_the_weights(hub, client, served, tmp_path, status, what, kind):
    hub.refusals[REPOSITORY] = status, what
    failed = client.fail('evo_test_vit', cache_dir=tmp_path)
    assert kind in failed.message and 'access to the repository' in failed.message
    assert str(status) in failed.message and f'{REPOSITORY}/resolve/main/{WEIGHTS}' in failed.message
    assert hub.requests(REPOSITORY) == asked_for(REPOSITORY, 'HEAD')


@REFUSALS
def test_a_refusal_does_no_harm_to_cached_weights(hub, client, served, dense, tmp_path, status, what, kind):
    client.pull('evo_test_vit', cache_dir=tmp_path)
    hub.refusals[REPOSITORY] = status, what
    hub.log.clear()
    assert_equal(client.pull('evo_test_vit', cache_dir=tmp_path).weights, load_file(dense / WEIGHTS))
    assert hub.requests(REPOSITORY) == asked_for(REPOSITORY, 'HEAD')


def test_a_repository_without_weights_is_an_error_that_names_it(hub, client, tmp_path):
    hub.add(REPOSITORY, {'config.json': b'{}'})
    failed = client.fail('evo_test_vit', cache_dir=tmp_path)
    assert 'EntryNotFoundError' in failed.message and REPOSITORY in failed.message


@pytest.fixture(params=['connection_refused', 'told_to_be_offline'])
def cut_off(request, processes, hub, client):
    """A client for which there is no hub, once it is entered."""
    @contextmanager
    def without_hub():
        if request.param == 'told_to_be_offline':
            yield processes[2]
        else:
            with hub.unreachable():
                yield client
    return without_hub


def test_without_hub_and_cache_the_message_names_the_repository(hub, cut_off, served, tmp_path):
    with cut_off() as lonely:
        failed = lonely.fail('evo_test_vit', cache_dir=tmp_path)
    assert f'from {REPOSITORY} on the Hugging Face Hub' in failed.message and 'Check the connection' in failed.message
    assert hub.requests(REPOSITORY) == []


def test_without_hub_cached_weights_are_taken(hub, client, cut_off, served, dense, tmp_path):
    client.pull('evo_test_vit', cache_dir=tmp_path)
    hub.log.clear()
    with cut_off() as lonely:
        assert_equal(lonely.pull('evo_test_vit', cache_dir=tmp_path).weights, load_file(dense / WEIGHTS))
    assert hub.requests(REPOSITORY) == []


# There and back.

def save_evolved(name: str, folder: Path) -> nn.Module:
    """Save a model with arguments and weights of its own."""
    model = timm.create_model(name, **ROUND_TRIPS[name]).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_for_hf(model, folder, model_args=arguments(model, name), safe_serialization=True)
    return model


def assert_same(pulled: Pulled, model: nn.Module, image_size: int) -> None:
    """The same weights, evolution and, bit for bit, logits."""
    assert_equal(pulled.weights, model.state_dict())
    assert pulled.schedule == tuple(model.schedule)
    assert torch.equal(torch.from_numpy(pulled.logits), classify(model, image_size))


@pytest.mark.parametrize('name', ROUND_TRIPS)
def test_a_saved_model_comes_back_from_its_folder_and_from_the_hub(hub, client, tmp_path, name):
    folder, image_size = tmp_path / 'saved', ROUND_TRIPS[name].get('img_size', 160)
    model = save_evolved(name, folder)
    assert set(np.ravel(ROUND_TRIPS[name]['keep_ratio'])) <= set(model.schedule.keep_ratio)
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == name
    arguments = {key: value for key, value in ROUND_TRIPS[name].items() if key != 'img_size'}  # height and width there
    assert {key: config['model_args'][key] for key in arguments} == arguments

    local = reload(folder).eval()
    assert type(local) is type(model) and local.schedule == model.schedule
    assert torch.equal(classify(local, image_size), classify(model, image_size))

    hub.add('somebody/evolved', folder)
    pulled = client.pull('hf-hub:somebody/evolved', image_size=image_size, cache_dir=tmp_path)
    assert_same(pulled, model, image_size)
    assert pulled.architecture == name
    assert [(request.method, request.path.rpartition('/')[2]) for request in hub.requests('somebody/evolved')] == [
        ('HEAD', 'config.json'), ('GET', 'config.json'), ('HEAD', WEIGHTS), ('GET', WEIGHTS)]


@pytest.mark.parametrize('name, function', [('evo_test_vit', push), ('evo_deit_tiny_patch16_224', push_with_card)])
def test_a_pushed_model_comes_back_from_the_hub(hub, client, tmp_path, name, function):
    skip_without_folders()
    folder, image_size = tmp_path / 'saved', ROUND_TRIPS[name].get('img_size', 160)
    model = save_evolved(name, folder)
    commit = client.call(function, str(folder), 'somebody/pushed', name)
    files = hub.repositories['somebody/pushed']
    assert set(files) - {'pytorch_model.bin'} == {'README.md', 'config.json', 'model.safetensors'}
    assert json.loads(files['config.json'].content)['architecture'] == name
    assert commit == hub.commit('somebody/pushed')
    if function is push_with_card:
        assert b'0.6 at 2, 0.4 at 4' in files['README.md'].content and 'pytorch_model.bin' not in files

    pulled = client.pull(f'hf-hub:somebody/pushed@{commit}', image_size=image_size, cache_dir=tmp_path)
    assert_same(pulled, model, image_size)


def test_a_converted_checkpoint_is_pushed(hub, client, tmp_path):
    reference = Reference('evo_deit_a')
    torch.save({'model': reference.group('state.')}, tmp_path / 'checkpoint.pth')
    client.call(convert_and_push, str(tmp_path / 'checkpoint.pth'), str(tmp_path / 'model'), 'somebody/converted')
    pulled = client.pull('hf-hub:somebody/converted', cache_dir=tmp_path)
    assert_equal(pulled.weights, load_file(tmp_path / 'model' / WEIGHTS))
    assert pulled.architecture == 'evo_deit_tiny_patch16_224'
    assert b'hf-hub:somebody/converted' in hub.repositories['somebody/converted']['README.md'].content


# A folder.

@pytest.fixture
def small() -> nn.Module:
    return timm.create_model('evo_test_vit')


def assert_saved(model: nn.Module, folder: Path) -> None:
    assert {path.name for path in folder.iterdir() if path.name[0] != '.'} == {'config.json', WEIGHTS, 'README.md'}
    loaded = reload(folder).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('name', ['evo_test_vit', 'evo_levit_128s'])
@pytest.mark.parametrize('fails', [False, True])
def test_saving_leaves_every_submodule_in_its_mode(tmp_path, monkeypatch, name, fails):
    model = timm.create_model(name).train()
    for i, module in enumerate(model.modules()):
        module.training = i % 3 != 0
    modes = [module.training for module in model.modules()]
    if fails:
        monkeypatch.setattr(evolved_hub, 'count_gmacs', mock.Mock(side_effect=OSError))
    with pytest.raises(OSError) if fails else nullcontext():
        evolved_hub.save(model, tmp_path / 'model')
    assert [module.training for module in model.modules()] == modes


def test_weights_that_change_after_saving_are_those_that_compute(tmp_path):
    model, other = (timm.create_model('evo_levit_128s').eval() for _ in range(2))
    for name, value in other.state_dict().items():
        if name.endswith('attention_biases'):
            value.uniform_(-1, 1)
    evolved_hub.save(model, tmp_path / 'model')  # which runs it, and LeViT keeps the biases that it has computed
    model.load_state_dict(other.state_dict())
    assert torch.equal(classify(model, 224), classify(other, 224))


def test_an_empty_folder_and_the_current_one_take_a_model(small, tmp_path, monkeypatch):
    (tmp_path / 'empty').mkdir()
    evolved_hub.save(small, tmp_path / 'empty')
    assert_saved(small, tmp_path / 'empty')

    (tmp_path / 'current').mkdir()
    monkeypatch.chdir(tmp_path / 'current')
    assert evolved_hub.save(small, '.') == tmp_path / 'current'
    assert_saved(small, Path('.'))
    assert "create_model('local-dir:current'" in Path('README.md').read_text()


def test_a_timm_that_notes_no_arguments_gets_those_of_evolution(tmp_path):
    model = timm.create_model('evo_test_vit', keep_ratio=0.7, selection='stage')
    if hasattr(model, '_model_args'):
        del model._model_args
    model.set_evolution(start_block=2)
    evolved_hub.save(model, tmp_path / 'model', model_args=dict(drop_rate=0.1))
    noted = json.loads((tmp_path / 'model' / 'config.json').read_text())['model_args']
    assert noted.items() >= dict(keep_ratio=0.7, selection='stage', start_block=2, drop_rate=0.1).items()


def test_hidden_files_stay_as_they_are(small, tmp_path):
    (tmp_path / '.git').mkdir()
    (tmp_path / '.git' / 'HEAD').write_text('ref: refs/heads/main')
    (tmp_path / '.gitattributes').write_text('*.safetensors filter=lfs')
    for force in (False, True):
        evolved_hub.save(small, tmp_path, force=force)
        assert_saved(small, tmp_path)
        assert {path.name for path in tmp_path.iterdir() if path.name[0] == '.'} == {'.git', '.gitattributes'}
        assert (tmp_path / '.git' / 'HEAD').read_text() == 'ref: refs/heads/main'
        assert (tmp_path / '.gitattributes').read_text() == '*.safetensors filter=lfs'


def test_a_folder_that_is_a_link_stays_one(small, tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'disk')
    for force in (False, True):
        evolved_hub.save(small, tmp_path / 'link', force=force)
        assert (tmp_path / 'link').is_symlink()
        assert_saved(small, tmp_path / 'disk')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['disk', 'link']


def test_a_model_is_replaced_by_force_alone_and_other_files_by_nothing(small, tmp_path):
    evolved_hub.save(small, tmp_path)
    with pytest.raises(FileExistsError, match='Use force=True .* to replace it'):
        evolved_hub.save(timm.create_model('evo_test_vit'), tmp_path)
    assert_saved(small, tmp_path)
    (tmp_path / 'thesis.tex').write_text('years of work')
    with pytest.raises(FileExistsError, match='thesis.tex'):
        evolved_hub.save(small, tmp_path, force=True)
    assert (tmp_path / 'thesis.tex').read_text() == 'years of work'
    with pytest.raises(FileExistsError, match='is a file. It must be a folder'):
        evolved_hub.save(small, tmp_path / 'thesis.tex', force=True)


def test_a_failure_while_writing_leaves_what_was_there(small, tmp_path, monkeypatch):
    evolved_hub.save(small, tmp_path / 'model')
    monkeypatch.setattr(evolved_hub, 'save_for_hf', mock.Mock(side_effect=OSError('No space left on device')))
    for name in ('model', 'new'):
        with pytest.raises(OSError, match='No space left'):
            evolved_hub.save(timm.create_model('evo_test_vit'), tmp_path / name, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ['model']
    assert_saved(small, tmp_path / 'model')
    assert len(list((tmp_path / 'model').iterdir())) == 3


@pytest.mark.parametrize('num_moved', [0, 1, 2])
def test_files_of_two_models_are_never_taken_for_one(small, tmp_path, monkeypatch, num_moved):
    evolved_hub.save(small, tmp_path)
    moves = iter([os.replace] * num_moved)

    def move(*args):
        next(moves, mock.Mock(side_effect=OSError('disconnected')))(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evolved_hub.os, 'replace', move)
        with pytest.raises(OSError, match='disconnected'):
            evolved_hub.save(timm.create_model('evo_test_vit', keep_ratio=0.9), tmp_path, force=True)
    with pytest.raises(FileNotFoundError, match='config'):
        reload(tmp_path)
    evolved_hub.save(small, tmp_path, force=True)
    assert_saved(small, tmp_path)


@pytest.mark.parametrize('numbers', [
    dict(keep_ratio=np.float32(0.5), start_block=np.int64(3), num_classes=np.int64(5), fast_update=np.bool_(False)),
    dict(keep_ratio=np.array([0.5, 0.25], np.float32), tradeoff=(np.float64(0.5),) * 6, in_chans=np.int32(1)),
], ids=['numbers', 'sequences'])
def test_numbers_of_numpy_are_saved_as_plain_ones(numbers, tmp_path):
    arguments = dict(depth=np.int64(6), selection='stage', **numbers)
    model = timm.create_model('evo_test_vit', **arguments)
    evolved_hub.save(model, tmp_path, model_args=arguments)
    config = json.loads((tmp_path / 'config.json').read_text())
    given = config['model_args']
    assert given['depth'] == 6 and given.keys() >= numbers.keys()
    assert all(given[key] == np.asarray(value).tolist() for key, value in numbers.items())
    loaded = reload(tmp_path)
    assert loaded.schedule == model.schedule and loaded.num_classes == model.num_classes


def test_a_number_of_numpy_that_was_set_later_is_saved(small, tmp_path):
    small.set_evolution(keep_ratio=np.float32(0.5))
    small.reset_classifier(3)
    evolved_hub.save(small, tmp_path)
    if hasattr(small, '_model_args'):
        assert json.loads((tmp_path / 'config.json').read_text())['model_args']['keep_ratio'] == 0.5
