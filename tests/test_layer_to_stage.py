"""Layer-wise selection until a number of optimizer updates have been made, stage-wise from then on.

Nothing tells the model about updates: the loops here are those of any training script.
"""
import copy
import gc
import io
import warnings
import weakref

import pytest
import timm
import torch
import torch._dynamo.testing
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from timm_evo.schedule import make_layerwise, make_pyramid_schedule, make_schedule

DEIT = dict(img_size=32, patch_size=4, embed_dim=32, depth=6, num_heads=2, num_classes=7, start_block=2, stage_depth=2)
LEVIT = dict(img_size=64, stem_type='s8', embed_dim=(16, 24), key_dim=8, depth=(4, 3), num_heads=(2, 3), num_classes=7)
MODELS = {
    'evo_deit_tiny_patch16_224': DEIT,
    'evo_deit_tiny_distilled_patch16_224': DEIT,
    'evo_levit_128s': LEVIT,
    'evo_levit_cls_128s': LEVIT,
}
N = 3


def create(name: str = 'evo_deit_tiny_patch16_224', **kwargs) -> nn.Module:
    """A small model whose tokens attend to each other unevenly, so that it matters which are selected."""
    torch.manual_seed(0)
    model = timm.create_model(name, **MODELS[name] | kwargs)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if 'learn_tradeoff' not in key:  # where it starts, it is what the first phase holds it at
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    return model


def counting(name: str = 'evo_deit_tiny_patch16_224', **kwargs) -> nn.Module:
    return create(name, **dict(layerwise_updates=N) | kwargs)


def images(model: nn.Module, batch_size: int = 4, seed: int = 1) -> torch.Tensor:
    size = 32 if 'deit' in model.pretrained_cfg['architecture'] else 64
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(seed))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 1) -> None:
    for _ in range(times):
        optimizer.zero_grad()
        model(images(model)).square().mean().backward()
        optimizer.step()


def logits_as(model: nn.Module, **settings) -> torch.Tensor:
    """Logits in inference of the same weights in a model without a schedule over updates."""
    other = create(model.pretrained_cfg['architecture'], **settings)
    other.load_state_dict(model.state_dict())
    return other.eval()(images(model))


def selection(model: nn.Module) -> str:
    """What the model does in inference, from its logits alone."""
    mode = model.training
    logits = model.eval()(images(model))
    model.train(mode)
    as_layer, as_stage = (torch.equal(logits, logits_as(model, selection=s)) for s in ('layer', 'stage'))
    assert as_layer != as_stage
    return 'layer' if as_layer else 'stage'


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


# The schedule


def test_a_selection_per_block_until_the_updates_are_made_and_one_per_stage_afterwards(name):
    model = counting(name)
    optimizer = sgd(model)
    for updates in range(N + 2):
        assert model.num_updates == updates
        assert selection(model) == ('layer' if updates < N else 'stage')
        update(model, optimizer)


def test_training_selects_as_inference(name):
    """Both phases, by the gradients of a model that has no schedule over updates."""
    for updates, expected in ((0, 'layer'), (N, 'stage')):
        model = counting(name)
        update(model, sgd(model), updates)
        other = create(name, selection=expected)
        other.load_state_dict(model.state_dict())
        model.zero_grad()
        for m in (model, other):
            m.train()(images(model)).square().mean().backward()
        gradients = dict(other.named_parameters())
        for key, parameter in model.named_parameters():
            if 'learn_tradeoff' not in key:
                torch.testing.assert_close(parameter.grad, gradients[key].grad)


@pytest.mark.parametrize('keep_ratio', [0.5, 0.7])
@pytest.mark.parametrize('tradeoff', [0.5, 1.])
def test_the_first_phase_is_the_layerwise_schedule(keep_ratio, tradeoff):
    flat = (keep_ratio, 4, 4)
    assert make_layerwise(make_schedule(12, *flat, 'stage', tradeoff)) == make_schedule(12, *flat, 'layer', tradeoff)
    pyramid = ([3, 2, 4], keep_ratio, 2)
    stagewise, layerwise = (make_pyramid_schedule(*pyramid, s, tradeoff) for s in ('stage', 'layer'))
    assert make_layerwise(stagewise) == layerwise


def test_each_block_takes_the_keep_ratio_of_its_stage():
    model = counting(keep_ratio=[0.7, 0.4])
    torch.testing.assert_close(
        model.eval()(images(model)), logits_as(model, selection='layer', keep_ratio=[0.7, 0.7, 0.4, 0.4]))
    model = counting(keep_ratio=[0.7, 1.])
    torch.testing.assert_close(
        model.eval()(images(model)), logits_as(model, selection='layer', keep_ratio=[0.7, 0.7, 1., 1.]))


@pytest.mark.parametrize('updates', [0, N])
def test_every_parameter_gets_a_gradient(name, updates):
    model = counting(name)
    update(model, sgd(model), updates)
    model.zero_grad()
    model(images(model)).square().mean().backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]


def test_learned_tradeoffs_are_held_while_selection_is_layerwise():
    model = counting('evo_levit_cls_128s', tradeoff=0.3)
    tradeoffs = {key: p for key, p in model.named_parameters() if 'learn_tradeoff' in key}
    assert tradeoffs
    with torch.no_grad():
        for parameter in tradeoffs.values():
            parameter.fill_(2.)  # wherever they have been
    held = create('evo_levit_cls_128s', selection='layer')
    start = torch.tensor([0.3]).logit()
    held.load_state_dict({
        key: start if 'learn_tradeoff' in key else value for key, value in model.state_dict().items()})
    torch.testing.assert_close(model.eval()(images(model)), held.eval()(images(model)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0)
    for updates in range(N + 1):
        assert all((parameter == 2).all() for parameter in tradeoffs.values()) == (updates <= N)
        update(model.train(), optimizer)
    assert all((parameter != 2).all() for parameter in tradeoffs.values())


# What counts


def test_gradient_accumulation_counts_once():
    model = counting()
    optimizer = sgd(model)
    for _ in range(4):
        model(images(model)).sum().backward()
    optimizer.step()
    assert model.num_updates == 1


def test_gradient_checkpointing_does_not_count(name):
    model = counting(name)
    model.set_grad_checkpointing()
    update(model, sgd(model), 2)
    assert model.num_updates == 2


@pytest.mark.parametrize('fused', [False, True], ids=['skipped by the scaler', 'skipped by the fused optimizer'])
def test_a_step_skipped_for_infinite_gradients_does_not_count(fused):
    model = counting()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler('cpu')
    for is_finite in (True, False, True):
        optimizer.zero_grad()
        scaler.scale(model(images(model)).mean()).backward()
        if not is_finite:
            model.head.bias.grad[0] = float('inf')
        scaler.step(optimizer)
        scaler.update()
    assert model.num_updates == 2


def test_the_optimizer_of_another_model_does_not_count():
    model, other = counting(), counting()
    update(other, sgd(other), N)
    assert (model.num_updates, other.num_updates) == (0, N)
    sgd(nn.Linear(7, 7)).step()
    assert (model.num_updates, other.num_updates) == (0, N)


def test_any_of_the_parameters_is_enough():
    model = counting()
    update(model, torch.optim.SGD(model.blocks[3].parameters(), lr=1e-3), 2)
    assert model.num_updates == 2


def test_optimizers_that_share_the_parameters_count_once():
    model = counting()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizers = [torch.optim.SGD(parameters, lr=1e-3) for parameters in (matrices, others)]
    for updates in range(1, N + 1):
        model(images(model)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        assert model.num_updates == updates


def test_an_optimizer_of_other_weights_goes_on_counting():
    model = counting()
    for parameters in (model.head.parameters(), model.parameters(), model.blocks.parameters()):
        update(model, torch.optim.SGD(parameters, lr=1e-3), 2)
    assert model.num_updates == 6


@pytest.mark.parametrize('opt', ['adamw', 'lamb', 'lookahead_adamw', 'muon', 'lion'])
def test_steps_of_timms_optimizers_count_once(opt):
    model = counting()
    try:
        optimizer = create_optimizer_v2(model, opt=opt, lr=1e-4)
    except ValueError as error:
        pytest.skip(f'timm {timm.__version__}: {error}')
    update(model, optimizer, 7)
    assert model.num_updates == 7


def test_a_failed_step_neither_counts_nor_stops_the_count():
    model = counting()
    optimizer = sgd(model)

    def fail() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fail)
    update(model, optimizer)
    update(model, sgd(model))
    assert model.num_updates == 2


def test_a_model_is_not_kept_alive_by_the_count():
    model = counting()
    update(model, sgd(model))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


# Checkpoints and copies


def test_the_count_is_in_the_state_dict_only_with_a_schedule_over_updates(name):
    assert set(counting(name).state_dict()) - set(create(name).state_dict()) == {'num_updates'}


def test_a_checkpoint_goes_on_where_it_was(name):
    model = counting(name)
    optimizer = sgd(model)
    update(model, optimizer, N - 1)
    buffer = io.BytesIO()
    torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, buffer)
    buffer.seek(0)
    checkpoint = torch.load(buffer, weights_only=True)

    resumed = counting(name)
    optimizer = sgd(resumed)
    resumed.load_state_dict(checkpoint['model'])
    optimizer.load_state_dict(checkpoint['optimizer'])
    assert resumed.num_updates == N - 1 and selection(resumed) == 'layer'
    update(resumed, optimizer)
    assert resumed.num_updates == N and selection(resumed) == 'stage'


@pytest.mark.parametrize('assign', [False, True])
def test_a_finished_checkpoint_is_stagewise_at_once_and_an_early_one_layerwise_again(assign):
    model, early = counting(), counting()
    update(model, sgd(model), N)
    loaded = counting().eval()
    loaded.load_state_dict(model.state_dict(), assign=assign)
    torch.testing.assert_close(loaded(images(loaded)), logits_as(loaded, selection='stage'))
    loaded.load_state_dict(early.state_dict(), assign=assign)
    torch.testing.assert_close(loaded(images(loaded)), logits_as(loaded, selection='layer'))


def test_checkpoints_load_strictly_with_and_without_a_schedule_over_updates(name):
    model, plain = counting(name), create(name)
    update(model, sgd(model), 2)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain.eval()(images(plain)), logits_as(model, selection='stage'))
    model.load_state_dict(plain.state_dict())
    assert model.num_updates == 2
    wrapped = nn.Sequential(model)
    wrapped.load_state_dict(nn.Sequential(plain).state_dict())
    nn.Sequential(plain).load_state_dict(wrapped.state_dict())


def test_a_model_from_the_meta_device_begins_to_count_at_zero():
    model = counting().to('meta')
    assert model.num_updates.is_meta
    model.to_empty(device='cpu')
    model.num_updates.fill_(99)  # as memory may have been left
    model.load_state_dict(create().state_dict())
    assert model.num_updates == 0 and selection(model) == 'layer'


def averages(model: nn.Module) -> dict:
    """Averaging copies of a model, with what updates and what holds them."""
    kinds = {'timm': ModelEmaV3(model, decay=0.5), 'one by one': ModelEmaV3(model, decay=0.5, foreach=False),
             'without buffers': ModelEmaV3(model, decay=0.5, exclude_buffers=True)}
    result = {kind: (ema, ema.update) for kind, ema in kinds.items()}
    average = AveragedModel(model)
    return result | {'torch': (average, average.update_parameters)}


@pytest.mark.parametrize('kind', averages(create()))
@pytest.mark.parametrize('told', [True, False])
def test_averaged_copies_follow(name, kind, told):
    """Such a copy is written to in place; validation may put it into evaluation mode again, or not."""
    if name == 'evo_levit_128s' and not told:
        pytest.skip("timm's LeViT keeps its attention biases until then, whatever is written to them")
    model = counting(name)
    average, follow = averages(model)[kind]
    average.eval()
    optimizer = sgd(model)
    for updates in range(1, N + 2):
        update(model, optimizer)
        follow(model)
        copied = average.module
        if told:
            average.eval()
        assert copied.num_updates == updates
        expected = logits_as(copied, selection='layer' if updates < N else 'stage')
        assert torch.equal(average(images(model)), expected)


def test_a_copy_counts_its_own_updates():
    model = counting()
    update(model, sgd(model))
    copied = copy.deepcopy(model)
    update(copied, sgd(copied), N - 1)
    assert (model.num_updates, copied.num_updates) == (1, N)
    assert (selection(model), selection(copied)) == ('layer', 'stage')


def test_a_copy_from_a_file_counts_its_own_updates():
    buffer = io.BytesIO()
    torch.save(counting(), buffer)
    buffer.seek(0)
    model = torch.load(buffer, weights_only=False)
    update(model, sgd(model), N)
    assert selection(model) == 'stage'


def test_models_that_have_lost_their_last_blocks_change_over(name):
    model = counting(name)
    model.prune_intermediate_layers([1 if 'levit' in name else 3], prune_head=False)
    update(model, sgd(model), N)
    pruned = create(name)
    pruned.prune_intermediate_layers([1 if 'levit' in name else 3], prune_head=False)
    pruned.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(images(model)), pruned.eval()(images(model)))


def test_features_follow(name):
    model = counting(name, features_only=True, out_indices=(0, 1))
    layer, stage = (create(name, features_only=True, out_indices=(0, 1), selection=s) for s in ('layer', 'stage'))
    x = torch.randn(2, 3, *[MODELS[name]['img_size']] * 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.)
    for updates in range(N + 1):
        expected = (layer if updates < N else stage)
        expected.load_state_dict(model.state_dict())
        for a, e in zip(model.eval()(x), expected.eval()(x), strict=True):
            torch.testing.assert_close(a, e)
        optimizer.step()


# Compilers


def test_two_compiled_graphs_one_for_each_phase(name):
    model = counting(name)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = sgd(model)
    for updates in range(1, 2 * N + 1):
        update_compiled = compiled(images(model)).square().mean()
        optimizer.zero_grad()
        update_compiled.backward()
        optimizer.step()
        assert counter.frame_count == (1 if updates <= N else 2)
    assert model.num_updates == 2 * N


def test_a_compiled_average_follows_when_it_is_set_to_evaluation():
    """As the `validate` of timm's training script begins."""
    model = counting()
    average = ModelEmaV3(model, decay=0.5)
    compiled = torch.compile(average, backend='eager')
    optimizer = sgd(model)
    for updates in range(1, N + 2):
        update(model, optimizer)
        average.update(model)
        compiled.eval()
        expected = logits_as(average.module, selection='layer' if updates < N else 'stage')
        torch.testing.assert_close(compiled(images(model)), expected)


@pytest.mark.parametrize('updates, expected', [(0, 'layer'), (N, 'stage')])
def test_a_scripted_or_exported_model_stays_in_its_phase(name, updates, expected):
    model = counting(name)
    update(model, sgd(model), updates)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # torch.jit.script is deprecated
        scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images(model)), logits_as(model, selection=expected))
    exported = torch.export.export(model, (images(model),)).module()
    torch.testing.assert_close(exported(images(model)), logits_as(model, selection=expected))


# Errors


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('arguments, message', [
    (dict(layerwise_updates=-1), 'layerwise_updates=-1 is not allowed, it must be a number of optimizer updates'),
    (dict(layerwise_updates=2.5), 'layerwise_updates=2.5 is not allowed'),
    (dict(layerwise_updates=True), 'layerwise_updates=True is not allowed'),
    (dict(layerwise_updates=9, selection='layer'), "layerwise_updates=9 is not allowed with selection='layer'"),
])
def test_arguments_out_of_range(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        create(name, **arguments)
