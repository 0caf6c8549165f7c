"""Layer-wise selection until a number of optimizer updates have been made, stage-wise from then on.

Nothing tells the model about updates: the loops here are those of any training script.
"""
import copy
import gc
import io
import subprocess
import sys
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch._dynamo.testing
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from timm_evo import evolve
from timm_evo.method.schedule import make_layerwise, make_pyramid_schedule, make_schedule

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


def test_an_optimizer_of_other_weights_continues_the_count():
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


class Wrapper(torch.optim.Optimizer):
    """An optimizer that leaves the steps to another one, which has the same parameters."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


class Derived(torch.optim.SGD):
    """An optimizer that extends the step of its base class, both of which PyTorch calls back after."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize('optimizer_of', [
    lambda parameters: Wrapper(torch.optim.SGD(parameters, lr=1e-3)),
    lambda parameters: Wrapper(Wrapper(torch.optim.SGD(parameters, lr=1e-3))),
    lambda parameters: Derived(parameters, lr=1e-3),
], ids=['wrapped', 'wrapped twice', 'derived'])
@pytest.mark.parametrize('num_optimizers', [1, 2])
def test_a_step_within_a_step_of_the_same_weights_counts_once(optimizer_of, num_optimizers):
    sgd(nn.Linear(7, 7))  # PyTorch follows the step of a class from its first optimizer on
    model = counting()
    parameters = list(model.parameters())
    optimizers = [optimizer_of(parameters[i::num_optimizers]) for i in range(num_optimizers)]
    for updates in range(1, N + 1):
        for optimizer in optimizers:
            optimizer.step()
        assert model.num_updates == updates


def test_a_step_within_a_step_of_other_weights_counts_for_each_model():
    outer, middle, inner = models = [counting() for _ in range(3)]
    outer_optimizer, middle_optimizer, inner_optimizer = map(sgd, models)
    for updates in range(1, N + 1):
        outer_optimizer.step(lambda: middle_optimizer.step(inner_optimizer.step))
        assert [model.num_updates for model in models] == [updates] * 3


def test_a_failed_step_within_a_step_does_not_hide_it():
    model, other = counting(), counting()
    optimizer, other_optimizer = sgd(model), sgd(other)

    def fail() -> float:
        raise ValueError

    def closure() -> None:
        with pytest.raises(ValueError):
            other_optimizer.step(fail)

    for updates in range(1, N + 1):
        optimizer.step(closure)
        assert (model.num_updates, other.num_updates) == (updates, 0)


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


@pytest.fixture
def switching_threads():
    """Python turns to another thread as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_models_in_many_threads_count_right(switching_threads):
    """Some are created, copied, changed and dropped while optimizers of others make their steps."""
    def work(name: str) -> list[int]:
        counts = []
        for trained in (model := timm.create_model(name, **MODELS[name], layerwise_updates=N), copy.deepcopy(model)):
            optimizer = sgd(trained)
            for updates in range(5):
                trained.add_module(f'added{updates}', nn.Identity())
                optimizer.step()
            counts.append(int(trained.num_updates))
        return counts

    with ThreadPoolExecutor(8) as pool:
        for counts in pool.map(work, [*MODELS] * 4):
            assert counts == [5, 5]


def test_threads_that_train_one_model_count_each_step(switching_threads):
    model = counting(layerwise_updates=2000)
    ready = threading.Barrier(8)

    def work(optimizer: torch.optim.Optimizer) -> None:
        ready.wait()
        for _ in range(250):
            optimizer.step()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [sgd(model) for _ in range(8)]))
    assert model.num_updates == 2000
    assert model.schedule == create().schedule


def test_a_step_in_another_thread_is_not_a_step_within():
    model = counting()
    optimizer, other_optimizer = sgd(model), sgd(model)

    def step_elsewhere() -> None:
        thread = threading.Thread(target=other_optimizer.step)
        thread.start()
        thread.join()

    optimizer.step(step_elsewhere)
    assert model.num_updates == 2


# Checkpoints and copies


def test_the_count_is_in_the_state_dict_only_with_a_schedule_over_updates(name):
    assert set(counting(name).state_dict()) - set(create(name).state_dict()) == {'num_updates'}


def test_a_checkpoint_continues_the_count(name):
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


def test_a_shallow_copy_shares_the_count_as_it_shares_the_weights(name):
    model = counting(name)
    copied = copy.copy(model)
    for updates, optimizer in enumerate([sgd(model), sgd(copied)] * N):
        expected = 'layer' if updates < N else 'stage'
        for m in (model, copied):
            assert m.num_updates == updates and selection(m) == expected
        optimizer.step()


def test_a_shallow_copy_outlives_what_it_was_made_of():
    copied = copy.copy(counting())
    gc.collect()
    update(copied, sgd(copied), N)
    assert copied.num_updates == N and selection(copied) == 'stage'


def test_a_shallow_copy_amid_an_update_does_not_begin_another():
    model = counting()
    first, second = (torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model.head, model.blocks))
    first.step()
    copied = copy.copy(model)
    second.step()
    assert model.num_updates == copied.num_updates == 1


def test_a_shallow_copy_follows_a_checkpoint_loaded_into_the_other():
    model, finished = counting(), counting()
    update(finished, sgd(finished), N)
    copied = copy.copy(model)
    model.load_state_dict(finished.state_dict())
    assert copied.schedule == finished.schedule
    sgd(model).step()
    assert copied.schedule == finished.schedule


def test_shallow_copies_that_begin_to_count_later_share_the_count():
    dense = timm.create_model('test_vit')
    models = [evolve(copy.copy(dense), selection='stage'), evolve(dense, selection='stage')]
    models.append(copy.copy(models[0]))
    for model in models:
        model.set_evolution(layerwise_updates=N)
    optimizer = sgd(dense)
    for updates in range(1, N + 1):
        optimizer.step()
        for model in models:
            assert model.num_updates == updates
            stagewise = evolve(timm.create_model('test_vit'), selection='stage').schedule
            assert (model.schedule == stagewise) == (updates == N)


def test_a_shallow_copy_stops_to_count_with_the_buffer_it_shares():
    model = evolve(timm.create_model('test_vit'), selection='stage', layerwise_updates=N)
    copied = copy.copy(model)
    model.set_evolution(layerwise_updates=0)
    sgd(copied).step()
    assert copied.num_updates is None


def test_a_count_made_in_inference_mode_continues_in_training(name):
    with torch.inference_mode():
        model = counting(name)
    for module in model.modules():  # weights of inference mode can't be trained, copies of them can
        for key, parameter in module.named_parameters(recurse=False):
            setattr(module, key, nn.Parameter(parameter.clone(), parameter.requires_grad))
    sgd(model).step()
    assert model.num_updates == 1


def test_a_count_begun_in_inference_mode_continues_in_training():
    model = evolve(timm.create_model('test_vit'), selection='stage')
    with torch.inference_mode():
        model.set_evolution(layerwise_updates=N)
    sgd(model).step()
    assert model.num_updates == 1


def test_a_count_loaded_in_inference_mode_continues_in_training():
    model, plain = counting(), create()
    with torch.inference_mode():
        model.load_state_dict(plain.state_dict(), assign=True)
    sgd(model).step()
    assert model.num_updates == 1


def test_a_buffer_that_is_replaced_is_followed():
    model = counting().eval()
    model.num_updates = torch.tensor(N)
    torch.testing.assert_close(model(images(model)), logits_as(model, selection='stage'))


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

# The forward pass of a distilled model is that of the first, and LeViT with a class token learns its trade-offs, too.
def quick(*names: str) -> pytest.MarkDecorator:
    """Of the others by `make tests-slow`."""
    return pytest.mark.parametrize(
        'name', [pytest.param(name, marks=[] if name in names else pytest.mark.slow) for name in MODELS])


@quick('evo_deit_tiny_patch16_224')
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


def test_a_compiled_step_of_the_optimizer_counts_and_is_compiled_once():
    model = counting()
    optimizer = sgd(model)
    model(images(model)).sum().backward()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda: optimizer.step(), backend=counter)
    for updates in range(1, 2 * N + 1):
        compiled()
        assert model.num_updates == updates and counter.frame_count == 1


@pytest.mark.slow
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


def test_a_model_without_it_carries_nothing_of_it():
    code = """
import timm
from torch.optim import optimizer
model = timm.create_model('evo_test_vit', selection='stage')
print([cls.__name__ for cls in type(model).__mro__ if cls.__name__ == 'LayerToStage'])
print(hasattr(model, 'num_updates'), len(optimizer._global_optimizer_post_hooks))
model.set_evolution(layerwise_updates=2)
print(int(model.num_updates), len(optimizer._global_optimizer_post_hooks))
"""
    printed = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ['[]', 'False 0', '0 1']


@quick('evo_deit_tiny_patch16_224', 'evo_levit_cls_128s')
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
    (dict(layerwise_updates=-1), 'layerwise_updates=-1 is not allowed. It must be a number of optimizer updates'),
    (dict(layerwise_updates=2.5), 'layerwise_updates=2.5 is not allowed'),
    (dict(layerwise_updates=True), 'layerwise_updates=True is not allowed'),
    (dict(layerwise_updates=9, selection='layer'), "layerwise_updates=9 is not allowed with selection='layer'"),
])
def test_arguments_out_of_range(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        create(name, **arguments)
