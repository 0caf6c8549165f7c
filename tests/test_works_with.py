"""Common changes of timm's models, by libraries and by hand, work for evolved models as for dense ones.

Many of them change weights or wrap modules. The scores must depend on the resulting queries and keys: a changed model
must select the same tokens as a plain model with the resulting weights.
"""
import copy
import inspect
import io
import pickle

import pytest
import timm
import torch
from small_vits import create as create_small
from small_vits import images
from this_torch import library
from timm.utils import AttentionExtract, ModelEmaV3, reparameterize_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from timm_evo import evolve, restore
from timm_evo.method import published

LAYERWISE = dict(selection='layer', start_block=2, keep_ratio=0.4)


def create(**kwargs) -> nn.Module:
    return create_small('evo_deit_tiny_patch16_224', **LAYERWISE | kwargs)


def create_dense(**kwargs) -> nn.Module:
    """With the weights of `create`."""
    return create_small('deit_tiny_patch16_224', **kwargs)


def without_fused_attention(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


@pytest.fixture
def selected(monkeypatch):
    """Gives the positions of the slow tokens that a call of a model selects, one tensor per selection."""
    seen = []
    select_tokens = published.select_tokens

    def spy(*args):
        seen.append(select_tokens(*args))
        return seen[-1]

    monkeypatch.setattr(published, 'select_tokens', spy)

    def selected(model: nn.Module, x: Tensor, **kwargs) -> Tensor:
        seen.clear()
        with torch.no_grad():
            model(x, **kwargs)
        return torch.stack(seen).sort(dim=-1)[0]

    return selected


def train_once(model: nn.Module, x: Tensor) -> list[str]:
    """Make an update of what is trained. Returns the names of those weights that got no gradient."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    return [name for name, parameter in trained.items() if parameter.grad is None]


# Quantized weights: torchao and PyTorch's own


def quantize(model: nn.Module, config: str) -> nn.Module:
    if config == 'torch.ao dynamic':
        if not hasattr(torch.ao.quantization, 'quantize_dynamic'):
            pytest.skip('this torch has it no more')
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    quantization = library('torchao.quantization')
    quantization.quantize_(model, getattr(quantization, config)())
    return model


def take_quantized_weights(model: nn.Module, quantized: nn.Module) -> nn.Module:
    """Give a model the values that the weights of a quantized one stand for."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight = quantized.get_submodule(name).weight
            weight = weight() if callable(weight) else weight
            assert type(weight.data) is not Tensor or weight.is_quantized, name
            module.weight.data.copy_(weight.dequantize())
    return model


@pytest.mark.parametrize('config', ['Int8WeightOnlyConfig', 'Float8WeightOnlyConfig'])
@torch.no_grad()
def test_quantized_weights_select_the_tokens_that_their_values_select(config, selected):
    quantized = quantize(create(), config)
    x = images(quantized, 8)
    plain = take_quantized_weights(create(), quantized)
    torch.testing.assert_close(quantized(x), plain(x), rtol=0, atol=2e-5)
    assert torch.equal(selected(quantized, x), selected(plain, x))
    assert not torch.equal(quantized(x), create()(x))


@pytest.mark.filterwarnings('ignore:.*quantize_per_tensor:UserWarning', 'ignore:.*:DeprecationWarning')
@pytest.mark.parametrize('config', ['Int8DynamicActivationInt8WeightConfig', 'torch.ao dynamic'])
@torch.no_grad()
def test_quantized_activations_move_the_logits_little_as_in_the_dense_model(config, selected):
    x = images(create(), 8)
    errors = []
    for create_one in (create_dense, create):
        model, quantized = create_one(), quantize(create_one(), config)
        errors.append((quantized(x) - model(x)).norm() / model(x).norm())
    assert 0 < errors[0] < 0.1 and 0 < errors[1] < 0.1
    both = zip(selected(create(), x).flatten(0, 1), selected(quantized, x).flatten(0, 1), strict=True)
    shared = [torch.isin(ours, theirs).float().mean() for ours, theirs in both]
    assert torch.stack(shared).mean() > 0.9, 'scores that are a little off still select almost the same tokens'


@pytest.mark.slow
@torch.no_grad()
def test_a_quantized_model_is_compiled_whole():
    torch._dynamo.reset()
    quantized = quantize(create(), 'Int8WeightOnlyConfig')
    compiled = torch.compile(quantized, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(images(quantized)), quantized(images(quantized)), rtol=0, atol=1e-5)


def test_training_with_fake_quantization_reaches_every_weight():
    qat = library('torchao.quantization.qat')
    config = qat.QATConfig(weight_config=qat.IntxFakeQuantizeConfig(torch.int8, 'per_channel'), step='prepare')
    model = create().train()
    library('torchao.quantization').quantize_(model, config)
    assert type(model.blocks[0].attn.qkv) is not nn.Linear
    assert train_once(model, images(model)) == []


# Adapters: PEFT


def adapter_config(kind: str):
    """An adapter of the projection of queries, keys and values that changes what it computes from the beginning."""
    peft = library('peft')
    return {
        'LoRA': lambda: peft.LoraConfig(target_modules=['qkv'], r=4, init_lora_weights=False),
        'LoRA on all layers': lambda: peft.LoraConfig(
            target_modules=['qkv', 'attn.proj', 'fc1', 'fc2'], r=4, init_lora_weights=False, modules_to_save=['head']),
        'LoRA on the parameter': lambda: peft.LoraConfig(
            target_parameters=['attn.qkv.weight'], r=4, init_lora_weights=False),
        'DoRA': lambda: peft.LoraConfig(target_modules=['qkv'], r=4, use_dora=True, init_lora_weights=False),
        'IA3': lambda: peft.IA3Config(target_modules=['qkv'], feedforward_modules=[], init_ia3_weights=False),
        'OFT': lambda: peft.OFTConfig(target_modules=['qkv'], oft_block_size=8, init_weights=False),
        'VeRA': lambda: peft.VeraConfig(target_modules=['qkv'], r=4, init_weights=False),
        'LoHa': lambda: peft.LoHaConfig(target_modules=['qkv'], r=4, init_weights=False),
        'LoKr': lambda: peft.LoKrConfig(target_modules=['qkv'], r=4, init_weights=False),
    }[kind]()


ADAPTERS = [
    'LoRA', 'LoRA on all layers', 'LoRA on the parameter', 'DoRA', 'IA3', 'OFT', 'VeRA', 'LoHa', 'LoKr']


def adapt(model: nn.Module, kind: str) -> nn.Module:
    config = adapter_config(kind)
    torch.manual_seed(1)
    return library('peft').get_peft_model(model, config)


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('kind', ADAPTERS)
def test_an_adapted_model_trains_and_selects_what_the_merged_one_selects(kind, selected):
    adapted = adapt(create(), kind).train()
    x = images(adapted.base_model.model, 8)
    before = {name: parameter.clone() for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert train_once(adapted, x) == []
    changed = [not torch.equal(dict(adapted.named_parameters())[name], value) for name, value in before.items()]
    assert sum(changed) > 0.8 * len(changed)  # an adapter may have parts that start without effect

    adapted.eval()
    tokens = selected(adapted, x)
    with torch.no_grad():
        logits = adapted(x)
    assert not torch.equal(tokens, selected(create(), x)), 'the adapters matter to the scores'
    merged = adapted.merge_and_unload()
    assert type(merged) is type(create()) and type(merged.blocks[0].attn.qkv) is nn.Linear
    assert torch.equal(selected(merged, x), tokens)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('kind', ADAPTERS)
@torch.no_grad()
def test_adapters_are_saved_and_loaded(kind, tmp_path):
    adapted = adapt(create(), kind).eval()
    x = images(adapted.base_model.model)
    adapted.save_pretrained(tmp_path)
    loaded = library('peft').PeftModel.from_pretrained(create(), tmp_path).eval()
    assert not torch.equal(adapted(x), create()(x))
    assert torch.equal(loaded(x), adapted(x))


@torch.no_grad()
def test_adapters_are_turned_off_exchanged_and_mixed_in_a_batch():
    adapted = adapt(create(), 'LoRA').eval()
    adapted.add_adapter('other', adapter_config('LoRA'))
    x = images(adapted.base_model.model, 4)
    logits = {}
    for name in ('default', 'other'):
        adapted.set_adapter(name)
        logits[name] = adapted(x)
    assert (logits['default'] - logits['other']).abs().max() > 0.1
    names = ['default', 'other', 'other', 'default']
    mixed = torch.stack([logits[name][i] for i, name in enumerate(names)])
    torch.testing.assert_close(adapted(x, adapter_names=names), mixed, rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(x), create()(x), rtol=0, atol=1e-5)


def test_updates_of_adapters_alone_are_counted():
    adapted = adapt(create(selection='stage', layerwise_updates=2), 'LoRA').train()
    model = adapted.base_model.model
    begins = []
    for _ in range(3):
        begins.append(sum(model.schedule.begins))
        train_once(adapted, images(model))
    assert int(model.num_updates) == 3 and begins == [4, 4, 2]


# Wrappers: transformers and accelerate


@pytest.mark.parametrize('cls', ['TimmWrapperModel', 'TimmWrapperForImageClassification'])
@torch.no_grad()
def test_a_wrapper_of_transformers_is_saved_and_loaded_with_its_evolution(cls, tmp_path, selected):
    transformers = library('transformers', 'modeling_utils')
    model = create()
    arguments = dict(img_size=48, patch_size=8, embed_dim=48, num_heads=3, depth=6, **LAYERWISE)
    config = transformers.TimmWrapperConfig(
        architecture='evo_deit_tiny_patch16_224', model_args=arguments, num_labels=5,
        pretrained_cfg=dict(num_classes=5))
    wrapper = getattr(transformers, cls)(config).eval()
    wrapper.timm_model.load_state_dict(model.state_dict(), strict=cls != 'TimmWrapperModel')  # which has no head
    wrapper.save_pretrained(tmp_path)
    loaded = getattr(transformers, cls).from_pretrained(tmp_path).eval()
    assert type(loaded.timm_model) is type(model) and loaded.timm_model.evolution == model.evolution
    x = images(model)
    for one in (wrapper, loaded):
        assert torch.equal(selected(one, x), selected(model, x))
        out = one(x, output_hidden_states=True)
        assert [tuple(state.shape) for state in out.hidden_states] == [(2, 48, 6, 6)] * 6
        if cls == 'TimmWrapperModel':
            torch.testing.assert_close(out.last_hidden_state, model.forward_features(x), rtol=0, atol=1e-5)
        else:
            torch.testing.assert_close(out.logits, model(x), rtol=0, atol=1e-5)


@pytest.fixture
def accelerate():
    accelerate = pytest.importorskip('accelerate')
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # it is one for the process otherwise


@pytest.mark.parametrize('mixed_precision', ['no', 'bf16'])
def test_a_training_step_with_accelerate(mixed_precision, accelerate):
    plain = create().train()
    x = images(plain)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=mixed_precision == 'bf16'):
        loss = plain(x).float().square().mean()
    loss.backward()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
    model = create().train()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(x).square().mean())
    optimizer.step()
    unwrapped = accelerator.unwrap_model(model)
    assert type(unwrapped) is type(plain)
    for parameter, weight in zip(unwrapped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, weight - 0.1 * weight.grad, rtol=1e-5, atol=1e-5)


def offload(accelerate, how: str, model: nn.Module, folder: str) -> nn.Module:
    cpu = torch.device('cpu')
    if how == 'to the cpu':
        return accelerate.cpu_offload(model, execution_device=cpu)
    if how == 'to disk':
        return accelerate.disk_offload(model, folder, execution_device=cpu)
    places = {name: 'cpu' for name, _ in [*model.named_parameters(recurse=False), *model.named_children()]}
    del places['blocks']
    places |= {f'blocks.{i}': 'disk' if i % 2 else 'cpu' for i in range(len(model.blocks))}
    return accelerate.dispatch_model(model, places, main_device='cpu', offload_dir=folder, force_hooks=True)


@pytest.mark.filterwarnings('ignore:The following device_map keys:UserWarning')  # those of parameters
@pytest.mark.parametrize('how', ['to the cpu', 'to disk', 'every second block to disk'])
@torch.no_grad()
def test_a_model_whose_weights_come_when_a_module_is_called(how, tmp_path, selected, accelerate):
    model, plain = offload(accelerate, how, create(), str(tmp_path)), create()
    x = images(plain)
    assert torch.equal(selected(model, x), selected(plain, x))
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-5)
    assert model.blocks[3].attn.qkv.weight.is_meta


@torch.no_grad()
def test_an_empty_model_is_loaded_and_dispatched(tmp_path, accelerate):
    plain = create()
    torch.save(plain.state_dict(), tmp_path / 'model.pth')
    with accelerate.init_empty_weights():
        model = timm.create_model(
            'evo_deit_tiny_patch16_224', img_size=48, patch_size=8, embed_dim=48, num_heads=3, depth=6, num_classes=5,
            **LAYERWISE)
    model = accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / 'model.pth'), device_map={'': 'cpu'}).eval()
    assert torch.equal(model(images(plain)), plain(images(plain)))


# Function transforms


LEVIT = dict(img_size=64, stem_type='s8', embed_dim=(16, 24), key_dim=8, depth=(2, 3), num_heads=(2, 3), num_classes=5)


def create_levit(name: str) -> nn.Module:
    """Training, because timm keeps biases of one call for the next otherwise, with statistics that stay."""
    torch.manual_seed(0)
    model = timm.create_model(name, **LEVIT).train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.eval()
    return model


TRANSFORMED = {
    'vit': create,
    'vit, stage': lambda: create(selection='stage'),
    'vit, similarity': lambda: create(selection='similarity', start_block=None),
    'vit without class token': lambda: create(class_token=False, global_pool='avg'),
    'levit': lambda: create_levit('evo_levit_128s'),
    'levit with class token': lambda: create_levit('evo_levit_cls_128s'),
}


@pytest.mark.filterwarnings('ignore:There is a performance drop:UserWarning')
@pytest.mark.parametrize('kind', TRANSFORMED)
def test_gradients_per_sample_are_those_of_one_sample_at_a_time(kind):
    model = TRANSFORMED[kind]()
    size = 64 if 'levit' in kind else 48
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters: dict, image: Tensor) -> Tensor:
        return functional_call(model, (parameters, buffers), (image.unsqueeze(0),)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        expected = torch.autograd.grad(model(image.unsqueeze(0)).square().sum(), parameters.values())
        for name, gradient in zip(parameters, expected, strict=True):
            scale = max(1., gradient.abs().max().item())
            torch.testing.assert_close(per_sample[name][i], gradient, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.filterwarnings('ignore:There is a performance drop:UserWarning')
@torch.no_grad()
def test_an_ensemble_in_one_call():
    models = [create(seed=seed) for seed in range(3)]
    x = images(models[0])
    skeleton = create().to('meta')
    logits = vmap(lambda *state: functional_call(skeleton, state, (x,)))(*stack_module_state(models))
    torch.testing.assert_close(logits, torch.stack([model(x) for model in models]), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings('ignore:.*torch.jit.script.*:FutureWarning')
def test_forward_mode_gradients_are_differences():
    model = without_fused_attention(create()).double()
    x = images(model).double()
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    _, slope = jvp(model, (x,), (direction,))
    difference = (model(x + 1e-6 * direction) - model(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)
    assert slope.abs().max() > 0.01


# Copies


def save_and_load(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    'deepcopy': copy.deepcopy,
    'pickle': lambda model: pickle.loads(pickle.dumps(model)),
    'torch.save': save_and_load,
    'AveragedModel': lambda model: AveragedModel(model).eval(),
    'ModelEmaV3': lambda model: ModelEmaV3(model).eval(),
    'DataParallel': nn.DataParallel,  # without a GPU it calls the model
    'reparameterize_model': reparameterize_model,
    'share_memory': lambda model: model.share_memory(),
}


@pytest.mark.parametrize('how', COPIES)
@torch.no_grad()
def test_a_copy_computes_the_same(how):
    model = create()
    x = images(model)
    logits = model(x)
    assert torch.equal(COPIES[how](model)(x), logits)
    assert torch.equal(model(x), logits)


@pytest.mark.parametrize('how', ['deepcopy', 'pickle', 'torch.save'])
@pytest.mark.parametrize('training', [True, False])
def test_a_copy_between_forward_and_backward_has_its_own_gradients(how, training):
    model, plain = create().train(training), create().train(training)
    x = images(model)
    loss = model(x).square().sum()
    copied = COPIES[how](model)
    loss.backward()
    plain(x).square().sum().backward()
    for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)
    assert all(parameter.grad is None for parameter in copied.parameters())
    copied(x).square().sum().backward()
    for (name, parameter), expected in zip(copied.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)


def test_a_copy_that_is_made_while_a_block_runs_has_its_own_scores():
    model, plain = create(), create()
    x, copies = images(plain), []
    # of a block that is scored, after the tap has its queries and keys
    hook = model.blocks[3].mlp.register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(model)))
    model(x).sum().backward()
    hook.remove()
    copies[0].blocks[3].mlp._forward_pre_hooks.clear()
    plain(x).sum().backward()
    for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-5, atol=1e-5, msg=name)
    assert all(parameter.grad is None for parameter in copies[0].parameters())
    torch.testing.assert_close(copies[0](x), plain(x), rtol=0, atol=1e-5)


# Training with other means than one call and one backward pass


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@torch.no_grad()
def test_a_parametrized_projection_is_scored_as_its_weights():
    parametrized, plain = create(), create()
    for block, plain_block in zip(parametrized.blocks, plain.blocks, strict=True):
        parametrize.register_parametrization(block.attn.qkv, 'weight', Halved())
        plain_block.attn.qkv.weight /= 2
    x = images(plain)
    torch.testing.assert_close(parametrized(x), plain(x), rtol=0, atol=1e-5)
    with parametrize.cached():
        torch.testing.assert_close(parametrized(x), plain(x), rtol=0, atol=1e-5)
    for block in parametrized.blocks:
        parametrize.remove_parametrizations(block.attn.qkv, 'weight')
    assert torch.equal(parametrized(x), plain(x))


PARAMETRIZED = {  # model, its arguments, and where it has a weight to parametrize
    'position embedding': ('vit_tiny_patch16_224', {}, '', 'pos_embed'),
    'class token': ('vit_tiny_patch16_224', dict(global_pool='avg'), '', 'cls_token'),
    'norm of the keys': ('vit_tiny_patch16_224', dict(qk_norm=True), 'blocks.2.attn.k_norm', 'weight'),
    'rotations': ('eva02_tiny_patch14_224', dict(qk_norm=True), 'blocks.2.attn.q_norm', 'weight'),
    'biases of a LeViT': ('levit_128s', {}, 'stages.1.blocks.0.attn', 'attention_biases'),
}


@pytest.mark.parametrize('kind', PARAMETRIZED)
@pytest.mark.parametrize('evolves_first', [True, False])
@pytest.mark.parametrize('restores_first', [True, False])
@torch.no_grad()
def test_parametrizations_and_evolution_come_and_go_in_any_order(kind, evolves_first, restores_first):
    name, arguments, path, weight = PARAMETRIZED[kind]
    small = {} if 'levit' in name else dict(img_size=48, patch_size=8, embed_dim=48, num_heads=3, depth=6)
    if kind == 'rotations' and 'qk_norm' not in inspect.signature(timm.models.Eva).parameters:
        pytest.skip(f'timm {timm.__version__} norms no queries of Eva')
    dense = timm.create_model(name, **small | arguments).eval()
    for parameter in dense.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    plain.get_submodule(path).get_parameter(weight).mul_(0.5)
    x = torch.randn(2, 3, *(small.get('img_size', 224),) * 2)

    def register() -> None:
        parametrize.register_parametrization(model.get_submodule(path), weight, Halved())

    steps = [lambda: evolve(model, selection='stage'), register]
    for step in steps if evolves_first else steps[::-1]:
        step()
    evolve(plain, selection='stage')
    assert isinstance(model, type(plain))
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(x), plain(x), rtol=0, atol=1e-5)
    restore(plain)
    steps = [
        lambda: restore(model),
        lambda: parametrize.remove_parametrizations(model.get_submodule(path), weight)]
    for step in steps if restores_first else steps[::-1]:
        step()
    assert [type(module) for module in model.modules()] == [type(module) for module in dense.modules()]
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-5)
    assert model.state_dict().keys() == dense.state_dict().keys()


@pytest.mark.parametrize('how', ['the whole model checkpointed', 'activations saved on the cpu'])
def test_gradients_are_those_of_a_plain_step(how):
    model, plain = create().train(), create().train()
    x = images(model)
    if how == 'the whole model checkpointed':
        loss = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).square().sum()
    else:
        with torch.autograd.graph.save_on_cpu():
            loss = model(x).square().sum()
    loss.backward()
    plain(x).square().sum().backward()
    for (name, parameter), expected in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected[1].grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
def test_blocks_that_are_wrapped_for_checkpointing_and_compiled_in_one_graph_each():
    option = 'skip_fwd_side_effects_in_bwd_under_checkpoint'  # without it, blocks that are scored are not compiled
    if not hasattr(torch._dynamo.config, option):
        pytest.skip('this torch has no such option')
    torch._dynamo.reset()
    model, plain = create().train(), create().train()
    x = images(model)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
        model.blocks[i].compile(backend='aot_eager', fullgraph=True)
    with torch._dynamo.config.patch(option, True):
        model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_an_optimizer_step_in_the_backward_pass():
    model, plain = create().train(), create().train()
    x = images(model)
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.01)
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    model(x).square().sum().backward()
    train = torch.optim.SGD(plain.parameters(), lr=0.01)
    plain(x).square().sum().backward()
    train.step()
    for (name, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6, msg=name)


# Watching: attention maps, activations, gradients, counts


def attention_by_hook(model: nn.Module, x: Tensor) -> list[Tensor]:
    """As rollout takes it."""
    maps = []
    handles = [
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, out: maps.append(out))
        for block in model.blocks
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return maps


def attention_by_timm(method: str):
    return lambda model, x: list(AttentionExtract(model, method=method)(x).values())


@pytest.mark.parametrize('take', [attention_by_hook, attention_by_timm('hook'), attention_by_timm('fx')],
                         ids=['hooks', 'AttentionExtract, hook', 'AttentionExtract, fx'])
@torch.no_grad()
def test_attention_maps_are_taken_and_show_what_is_selected(take, selected):
    model = without_fused_attention(create())
    x = images(model)
    maps = take(model, x)
    # class token and 36 patches, then class token, 14 slow tokens and the representative
    assert [tuple(attention.shape) for attention in maps] == [(2, 3, 37, 37)] * 2 + [(2, 3, 16, 16)] * 4
    for attention in maps:
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))
    for attention, dense in zip(maps[:2], take(without_fused_attention(create_dense()), x)[:2], strict=True):
        torch.testing.assert_close(attention, dense, rtol=0, atol=1e-5)
    scores = maps[1][:, :, 0, 1:].sum(dim=1)  # of the last block before the first selection
    expected = scores.topk(14).indices.sort().values + 1
    assert torch.equal(selected(model, x)[0][:, 1:], expected)
    torch.testing.assert_close(model(x), create()(x), rtol=0, atol=1e-5)


def test_hooks_on_the_last_block_see_all_tokens_that_go_through_it():
    model, plain = create(), create()
    x, seen = images(model), {}
    norm = model.blocks[-1].norm1
    norm.register_forward_hook(lambda module, inputs, out: seen.update(activation=out.detach()))
    norm.register_full_backward_hook(lambda module, inputs, out: seen.update(gradient=out[0]))
    logits = model(x)
    logits[:, 2].sum().backward()
    assert seen['activation'].shape == seen['gradient'].shape == (2, 16, 48)
    assert (seen['gradient'].abs().amax(dim=-1) > 0).all()  # keys and values of all tokens reach the class token
    torch.testing.assert_close(logits, plain(x), rtol=0, atol=1e-5)


def test_gradients_of_the_image_are_differences():
    model = create().double()
    x = images(model).double().requires_grad_()
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    saliency, = torch.autograd.grad(model(x)[:, 2].sum(), x)
    with torch.no_grad():
        difference = (model(x + 1e-6 * direction) - model(x - 1e-6 * direction))[:, 2].sum() / 2e-6
    torch.testing.assert_close((saliency * direction).sum(), difference, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_feature_extractor_of_torchvision_and_hooks_see_the_same():
    model = create().eval()
    x, seen = images(model), {}
    places = ['blocks.1', 'blocks.3.mlp', 'blocks.5', 'norm']
    extracted = create_feature_extractor(model, places)(x)
    for place in places:
        model.get_submodule(place).register_forward_hook(lambda m, i, out, place=place: seen.update({place: out}))
    model(x)
    assert [tuple(extracted[place].shape) for place in places] == [(2, n, 48) for n in (37, 16, 16, 37)]
    for place in places:
        torch.testing.assert_close(extracted[place], seen[place], rtol=0, atol=1e-5)


@torch.no_grad()
def test_arithmetic_is_counted():
    x = images(create())
    counts = []
    for model in (create_dense(), create(keep_ratio=1.0, selection='stage'), create(selection='stage')):
        with FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[1] == counts[0]
    # four of six blocks see 16 tokens of 37; the counter watches all modules, so the last block is not made short
    assert 0.55 < counts[2] / counts[0] < 0.65


def test_an_evolved_instance_keeps_adapters_that_it_had():
    adapted = adapt(create_dense(), 'LoRA').eval()
    x = images(adapted.base_model.model)
    evolve(adapted.base_model.model, **LAYERWISE)
    merged = evolve(adapt(create_dense(), 'LoRA').merge_and_unload().eval(), **LAYERWISE)
    with torch.no_grad():
        torch.testing.assert_close(adapted(x), merged(x), rtol=1e-5, atol=1e-5)
