"""Training with sharded weights: FSDP2, FSDP1 and distributed checkpoints, against the same model in one process.

Two processes are started once and run all cases, each on its half of every batch.
"""
import socket
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from timm_evo import evolve

fsdp = pytest.importorskip('torch.distributed.fsdp')
if not hasattr(fsdp, 'fully_shard'):
    pytest.skip('this torch has FSDP2 elsewhere', allow_module_level=True)

DEIT = dict(img_size=24, patch_size=4, embed_dim=32, depth=6, num_heads=2, num_classes=5)
EVOLUTION = dict(keep_ratio=0.4, start_block=2, stage_depth=2)
NUM_STEPS = 3

# Arguments of the dense model, and of evolution. Those of a registered name have both at once.
MODELS = {
    'stage': ('deit_tiny_patch16_224', {}, dict(selection='stage')),
    'layer': ('deit_tiny_patch16_224', {}, dict(selection='layer')),
    'layer to stage': ('evo_deit_tiny_patch16_224', {}, dict(layerwise_updates=2)),
    'registered': ('evo_deit_tiny_patch16_224', {}, dict(selection='layer')),
    'qk norm': ('deit_tiny_patch16_224', dict(qk_norm=True), dict(selection='layer')),
    'no class token': (
        'deit_tiny_patch16_224', dict(class_token=False, global_pool='avg'), dict(selection='layer')),
    'two heads': ('evo_deit_tiny_patch16_224', dict(global_pool='avg'), dict(selection='layer', class_head=True)),
    'distilled': ('evo_deit_tiny_distilled_patch16_224', {}, {}),
    'rotations': ('vit_small_patch16_rope_mixed_224', {}, dict(selection='layer')),
    'rotations, similarity': (
        'eva02_tiny_patch14_224', {}, dict(selection='similarity', stage_depth=None, keep_ratio=0.5)),
    'similarity': ('deit_tiny_patch16_224', {}, dict(selection='similarity', stage_depth=None, keep_ratio=0.5)),
}

# Model, how its activations are checkpointed, how its blocks are compiled, how its weights are sharded.
CASES = {
    f'{model}, checkpointed {checkpointed}, compiled {compiled}': (model, checkpointed, compiled, 'FSDP2')
    for model in ('stage', 'layer', 'layer to stage')
    for checkpointed in ('not', 'by timm', 'by a wrapper')
    for compiled in ('not', 'in place')
} | {
    **{model: (model, 'not', 'not', 'FSDP2') for model in list(MODELS)[3:]},
    'layer, wrapped by the compiler': ('layer', 'not', 'wrapped', 'FSDP2'),
    'layer, compiled by the default backend': ('layer', 'not', 'inductor', 'FSDP2'),
    'layer, checkpointed by timm, compiled whole': ('layer', 'by timm', 'whole', 'FSDP2'),
    'layer, weights kept between forward and backward': ('layer', 'not', 'not', 'FSDP2, kept'),
    'layer, nothing but the root is sharded': ('layer', 'not', 'not', 'FSDP2, root'),
    **{f'{model}, FSDP1': (model, 'not', 'not', 'FSDP1') for model in ('stage', 'layer', 'layer to stage', 'qk norm')},
    'similarity, checkpointed by timm': ('similarity', 'by timm', 'not', 'FSDP2'),
    'similarity, compiled in place': ('similarity', 'not', 'in place', 'FSDP2'),
    'similarity, FSDP1': ('similarity', 'not', 'not', 'FSDP1'),
    'similarity, norm and head in a group of their own': ('similarity', 'not', 'not', 'FSDP2, norm'),
    'similarity, compiled whole, norm and head in a group of their own': ('similarity', 'not', 'whole', 'FSDP2, norm'),
    'layer, FSDP1, checkpointed by timm': ('layer', 'by timm', 'not', 'FSDP1'),
}
# One of those that compile is enough for every day.
QUICK_COMPILED = 'stage, checkpointed by a wrapper, compiled in place'


def create(name: str) -> nn.Module:
    """A small model in training mode, equal in every process, whose tokens attend to each other unevenly."""
    architecture, arguments, evolution = MODELS[name]
    torch.manual_seed(0)
    if architecture.startswith('evo_'):
        model = timm.create_model(architecture, **DEIT | arguments | EVOLUTION | evolution)
    else:
        model = evolve(timm.create_model(architecture, **DEIT | arguments), **EVOLUTION | evolution)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return model.train()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Images and targets of both processes."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 24, 24, generator=generator), torch.randint(5, (4,), generator=generator)


def plain_names(named_tensors) -> dict[str, Tensor]:
    """Whole tensors by the names that they have in a model that nothing is wrapped around."""
    whole = {}
    for name, tensor in named_tensors:
        for wrapper in ('_checkpoint_wrapped_module.', '_orig_mod.', '_fsdp_wrapped_module.'):
            name = name.replace(wrapper, '')
        whole[name] = (tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor).detach().clone()
    return whole


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, fsdp.FullyShardedDataParallel):
        with fsdp.FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return plain_names((name, parameter.grad) for name, parameter in model.named_parameters())
    return plain_names((name, parameter.grad) for name, parameter in model.named_parameters())


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, fsdp.FullyShardedDataParallel):
        with fsdp.FullyShardedDataParallel.summon_full_params(model):
            return plain_names(model.named_parameters())
    return plain_names(model.named_parameters())


def train(model: nn.Module, rank: int | None = None) -> dict:
    """Train on a half of every batch, or on whole batches, and note everything that can be compared."""
    evolved = model.module if isinstance(model, fsdp.FullyShardedDataParallel) else model
    part = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    # not AdamW, which makes a step of any size of gradients that are zero but for rounding, as those of key biases are
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    seen = dict(logits=[], gradients=[], counts=[], begins=[])
    for step in range(NUM_STEPS):
        images, targets = (tensor[part] for tensor in batch(step))
        optimizer.zero_grad()
        seen['begins'].append(sum(evolved.schedule.begins))
        logits = model(images)
        F.cross_entropy(logits, targets).backward()
        seen['logits'].append(logits.detach())
        seen['gradients'].append(whole_gradients(model))
        optimizer.step()
        seen['counts'].append(int(evolved.num_updates) if hasattr(evolved, 'num_updates') else None)
    seen['weights'] = whole_weights(model)
    model.eval()
    with torch.no_grad():
        seen['logits'].append(model(batch(NUM_STEPS)[0][part]))
    return seen


def checkpoint_and_compile(model: nn.Module, checkpointed: str, compiled: str) -> nn.Module:
    """What is done to the blocks before their weights are sharded, in the order of DINOv3 and torchtitan."""
    if checkpointed == 'by timm':
        model.set_grad_checkpointing()
    if compiled == 'whole':
        model.compile(backend='aot_eager')
        return model
    for i in range(len(model.blocks)):
        if checkpointed == 'by a wrapper':
            model.blocks[i] = checkpoint_wrapper(model.blocks[i])
        if compiled == 'wrapped':
            model.blocks[i] = torch.compile(model.blocks[i], backend='aot_eager')
        elif compiled != 'not':
            model.blocks[i].compile(backend='aot_eager' if compiled == 'in place' else 'inductor')
    return model


def shard(model: nn.Module, sharded: str) -> nn.Module:
    if sharded == 'FSDP1':
        policy = fsdp.wrap.ModuleWrapPolicy({Block})
        return fsdp.FullyShardedDataParallel(
            model, auto_wrap_policy=policy, device_id=torch.device('cpu'), use_orig_params=True)
    if sharded != 'FSDP2, root':
        for block in model.blocks:
            fsdp.fully_shard(block, reshard_after_forward='kept' not in sharded)
    if sharded == 'FSDP2, norm':
        fsdp.fully_shard([model.norm, model.head])
    return fsdp.fully_shard(model)


def run_case(case: str, rank: int) -> dict:
    name, checkpointed, compiled, sharded = CASES[case]
    torch._dynamo.reset()
    return train(shard(checkpoint_and_compile(create(name), checkpointed, compiled), sharded), rank)


def run_plain(rank: int) -> dict:
    """Whether FSDP2 averages gradients, of any model; torch 2.8 adds them up on a CPU."""
    model = fsdp.fully_shard(nn.Linear(1, 1))
    model(torch.ones(1, 1)).sum().backward()
    return dict(averages=bool(model.weight.grad.full_tensor() == 1))


def run_half_precision(rank: int) -> dict:
    """Logits with weights that are gathered in bfloat16."""
    model, policy = create('layer'), fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in model.blocks:
        fsdp.fully_shard(block, mp_policy=policy)
    fsdp.fully_shard(model, mp_policy=policy)
    with torch.no_grad():
        return dict(logits=model(batch(0)[0][2 * rank:2 * rank + 2]))


def run_refused(rank: int) -> dict:
    """What a model says that is checkpointed in a way which hides its keys."""
    model = create('layer')
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.REENTRANT)
    try:
        shard(model, 'FSDP2')(batch(0)[0][2 * rank:2 * rank + 2])
    except RuntimeError as error:
        return dict(message=str(error))
    return dict(message='')


def run_checkpoint(rank: int, folder: Path) -> dict:
    """Save what was trained, and load it into another sharded model."""
    model = shard(create('layer to stage'), 'FSDP2')
    seen = train(model, rank)
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / 'checkpoint')
    other = shard(create('layer to stage'), 'FSDP2')
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder / 'checkpoint')
    set_model_state_dict(other, state)
    begins = sum(other.schedule.begins)
    with torch.no_grad():
        logits = other.eval()(batch(NUM_STEPS)[0][2 * rank:2 * rank + 2])
    return seen | dict(loaded=logits, loaded_count=int(other.num_updates), loaded_begins=begins)


def run_meta_device(rank: int) -> dict:
    """Shard a model that has no weights yet, and give it those that one rank has."""
    state = create('layer to stage').state_dict() | dict(num_updates=torch.tensor(2))
    with torch.device('meta'):
        model = timm.create_model('evo_deit_tiny_patch16_224', **DEIT | EVOLUTION, layerwise_updates=2)
    model = shard(model, 'FSDP2')
    model.to_empty(device='cpu')
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state if rank == 0 else {}, options=options)
    with torch.no_grad():
        logits = model.eval()(batch(0)[0][2 * rank:2 * rank + 2])
    return dict(logits=logits, count=int(model.num_updates), begins=sum(model.schedule.begins))


def run_all(rank: int, port: int, folder: Path, cases: list[str]) -> None:
    """Body of one process."""
    dist.init_process_group(
        'gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2, timeout=timedelta(seconds=120))
    torch.set_num_threads(1)
    runs = {case: lambda case=case: run_case(case, rank) for case in cases} | {
        'plain': lambda: run_plain(rank),
        'half precision': lambda: run_half_precision(rank),
        'checkpoint': lambda: run_checkpoint(rank, folder),
        'meta device': lambda: run_meta_device(rank),
        'refused': lambda: run_refused(rank),
    }
    for name, run in runs.items():
        try:
            seen = run()
        except Exception:  # the test of this case fails with it, and the others continue
            seen = traceback.format_exc()
        torch.save(seen, folder / f'{name} {rank}.pth')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def folder(tmp_path_factory, request) -> Path:
    """Where two processes have left what they saw of the cases that are asked for."""
    asked = {item.callspec.params.get('case') for item in request.session.items if hasattr(item, 'callspec')}
    folder = tmp_path_factory.mktemp('sharding')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    mp.spawn(run_all, args=(port, folder, [case for case in CASES if case in asked]), nprocs=2)
    return folder


@pytest.fixture
def load(folder):
    """Gives what both processes saw of one run."""

    def load(name: str) -> list[dict]:
        ranks = [torch.load(folder / f'{name} {rank}.pth', weights_only=True) for rank in range(2)]
        errors = [seen for seen in ranks if isinstance(seen, str)]
        assert not errors, errors[0]
        return ranks

    return load


@pytest.fixture(scope='module')
def expected():
    """Gives what a model sees that is trained on whole batches in one process."""
    seen = {}

    def expected(name: str) -> dict:
        if name not in seen:
            seen[name] = train(create(name))
        return seen[name]

    return expected


def assert_close(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f'{name}: {m}')


def marked(cases: list[str]) -> list:
    return [
        pytest.param(case, marks=[pytest.mark.slow] if CASES[case][2] != 'not' and case != QUICK_COMPILED else [])
        for case in cases
    ]


@pytest.mark.parametrize('case', marked(list(CASES)))
def test_logits_gradients_and_updates_are_those_of_one_process(case, load, expected):
    if CASES[case][3] != 'FSDP1' and not load('plain')[0]['averages']:
        pytest.skip('FSDP2 of this torch does not average gradients of any model on a CPU')
    ranks, wanted = load(case), expected(CASES[case][0])
    for step, logits in enumerate(wanted['logits']):
        both = torch.cat([seen['logits'][step] for seen in ranks])
        torch.testing.assert_close(both, logits, rtol=1e-5, atol=1e-5)
    for seen in ranks:
        for actual, gradients in zip(seen['gradients'], wanted['gradients'], strict=True):
            assert_close(actual, gradients)
        assert_close(seen['weights'], wanted['weights'])
    start = dict(create(CASES[case][0]).named_parameters())
    moved = {name: (weight - start[name]).abs().max() for name, weight in wanted['weights'].items()}
    assert min(moved[f'blocks.{i}.attn.qkv.weight'] for i in range(6)) > 1e-3


@pytest.mark.parametrize('case', marked([case for case in CASES if CASES[case][0] == 'layer to stage']))
def test_both_ranks_count_the_updates_and_switch_at_the_same_one(case, load):
    for seen in load(case):
        assert seen['counts'] == [1, 2, 3]
        assert seen['begins'] == [4, 4, 2]  # a selection per block, and one per stage in the third update


def test_weights_that_are_gathered_in_half_precision_give_the_logits_of_a_model_in_half_precision(load):
    model = create('layer').bfloat16()
    with torch.no_grad():
        for seen, images in zip(load('half precision'), batch(0)[0].bfloat16().split(2), strict=True):
            assert seen['logits'].dtype == torch.bfloat16
            torch.testing.assert_close(seen['logits'], model(images), rtol=0, atol=0.02)


# Checkpoints

ONE_PROCESS = pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')  # which is what is meant


def test_a_distributed_checkpoint_is_loaded_by_another_sharded_model_with_its_count(load):
    for seen in load('checkpoint'):
        assert (seen['loaded_count'], seen['loaded_begins']) == (3, 2)
        assert torch.equal(seen['loaded'], seen['logits'][NUM_STEPS])


@ONE_PROCESS
@torch.no_grad()
def test_a_distributed_checkpoint_is_loaded_by_a_model_in_one_process_with_its_count(load, folder):
    logits = torch.cat([seen['logits'][NUM_STEPS] for seen in load('checkpoint')])
    model = create('layer to stage')
    assert sum(model.schedule.begins) == 4
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folder / 'checkpoint', no_dist=True)
    model.load_state_dict(state)
    assert (int(model.num_updates), sum(model.schedule.begins)) == (3, 2)
    torch.testing.assert_close(model.eval()(batch(NUM_STEPS)[0]), logits, rtol=1e-5, atol=1e-5)


@ONE_PROCESS
@torch.no_grad()
def test_a_distributed_checkpoint_is_loaded_by_the_dense_model(load, folder):
    weights = load('checkpoint')[0]['weights']
    dense = timm.create_model('deit_tiny_patch16_224', **DEIT)
    state = dense.state_dict()
    dcp.load(state, checkpoint_id=folder / 'checkpoint', no_dist=True)
    dense.load_state_dict(state)
    assert_close(dict(dense.named_parameters()), weights)


@torch.no_grad()
def test_a_model_that_is_sharded_before_it_has_weights_takes_those_of_the_first_rank_with_their_count(load):
    model = create('layer to stage')
    model.load_state_dict(model.state_dict() | dict(num_updates=torch.tensor(2)))
    ranks = load('meta device')
    assert [(seen['count'], seen['begins']) for seen in ranks] == [(2, 2)] * 2
    logits = torch.cat([seen['logits'] for seen in ranks])
    torch.testing.assert_close(logits, model.eval()(batch(0)[0]), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_that_hides_the_keys_of_sharded_blocks_is_refused_with_the_reason(load):
    for seen in load('refused'):
        assert 'Block 1 cannot be scored, because' in seen['message'] and 'use_reentrant=False' in seen['message']
