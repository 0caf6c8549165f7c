"""Training across processes: `DistributedDataParallel` as timm sets it up, without `find_unused_parameters`."""
import socket
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

DEIT = dict(img_size=32, patch_size=4, embed_dim=32, depth=6, num_heads=2, num_classes=7, start_block=2, stage_depth=2)
LEVIT = dict(img_size=64, stem_type='s8', embed_dim=(16, 24), key_dim=8, depth=(2, 3), num_heads=(2, 3), num_classes=7)
SETTINGS = {
    'stage': ('evo_deit_tiny_patch16_224', DEIT),
    'layer': ('evo_deit_tiny_patch16_224', DEIT | dict(selection='layer')),
    'preserve': ('evo_deit_tiny_patch16_224', DEIT | dict(fast_update=False)),
    'class head': ('evo_deit_tiny_patch16_224', DEIT | dict(global_pool='avg', class_head=True)),
    'distilled': ('evo_deit_tiny_distilled_patch16_224', DEIT),
    'levit': ('evo_levit_128s', LEVIT),
    'levit, stage': ('evo_levit_cls_128s', LEVIT),
    'layer to stage': ('evo_deit_tiny_patch16_224', DEIT | dict(layerwise_updates=1)),
    'levit, layer to stage': ('evo_levit_cls_128s', LEVIT | dict(layerwise_updates=1)),
    'levit, layer': ('evo_levit_cls_128s', LEVIT | dict(selection='layer', learn_tradeoff=False, class_head=True)),
}


def create(setting: str):
    name, arguments = SETTINGS[setting]
    return timm.create_model(name, **arguments).train()


def train(rank: int, port: int, folder: Path) -> None:
    """Body of one process: every rank starts from other weights and sees other images."""
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    torch.set_num_threads(1)
    for setting in SETTINGS:
        torch.manual_seed(rank)
        model = DistributedDataParallel(create(setting))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):  # a step fails if a parameter of the one before had no gradient
            optimizer.zero_grad()
            images = torch.randn(4, 3, *[SETTINGS[setting][1]['img_size']] * 2)
            F.cross_entropy(model(images), torch.randint(7, (4,))).backward()
            optimizer.step()
        torch.save(model.module.state_dict(), folder / f'{setting} {rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Where two processes have left their weights."""
    folder = tmp_path_factory.mktemp('ddp')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    mp.spawn(train, args=(port, folder), nprocs=2)
    return folder


@pytest.mark.parametrize('setting', [setting for setting in SETTINGS if 'to stage' in setting])
def test_two_processes_agree_on_the_number_of_updates(setting, folder):
    counts = [torch.load(folder / f'{setting} {rank}.pth', weights_only=True)['num_updates'] for rank in range(2)]
    assert counts == [3, 3]


@pytest.mark.parametrize('setting', SETTINGS)
def test_two_processes_train_every_parameter_and_end_with_equal_weights(setting, folder):
    first, second = (torch.load(folder / f'{setting} {rank}.pth', weights_only=True) for rank in range(2))
    torch.manual_seed(0)
    for key, start in create(setting).named_parameters():  # no statistics, each process has its own
        assert torch.equal(first[key], second[key]), key
        assert not torch.equal(first[key], start), f'{key} was not trained'
