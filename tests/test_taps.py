"""Scores are from the call of the block, so that changes of its weights and wrappers of its modules affect them."""
import copy
import functools
import gc
import io
import pickle
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn.functional as F
from slow_evolution import evolve_slowly
from test_method import KINDS, build, random_settings, slow_arguments
from this_torch import ANY_SIZE
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

import timm_evo
from timm_evo import EvoVisionTransformer, evolve, restore
from timm_evo.models import taps

BLOCKS = {
    'norms behind the branches': dict(block_fn=ResPostBlock, init_values=0.8),
    'parallel attentions': dict(block_fn=ParallelThingsBlock),
    'parallel attentions, no class token': dict(block_fn=ParallelThingsBlock, class_token=False, global_pool='avg'),
    'parallel branches': dict(block_fn=ParallelScalingBlock),
    'parallel branches, qk norm': dict(block_fn=ParallelScalingBlock, qk_norm=True, qkv_bias=False),
}
LAYERWISE = dict(selection='layer', start_block=2)


def images(batch_size: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch_size, 3, 24, 24, dtype=dtype, generator=torch.Generator().manual_seed(1))


def nothing_is_left(model: EvoVisionTransformer) -> bool:
    thread = taps._thread
    return thread.listener is None and not thread.is_in_model and all(tap.listener is None for tap in model._taps)


# Every kind of block


@pytest.mark.parametrize('kind', BLOCKS)
@pytest.mark.parametrize('seed', range(3))
@torch.no_grad()
def test_every_kind_of_block_equals_the_obvious_implementation(kind, seed):
    settings = random_settings(10 * seed + list(BLOCKS).index(kind))
    model = build(seed=seed, **BLOCKS[kind], **settings)
    expected = evolve_slowly(model, images(), **slow_arguments(settings))
    _, intermediates = model.forward_intermediates(images(), output_fmt='NLC', return_prefix_tokens=True)
    for i, (actual, wanted) in enumerate(zip(intermediates, expected, strict=True)):
        actual = torch.cat([actual[1], actual[0]], dim=1) if model.num_prefix_tokens else actual
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9, msg=lambda m, i=i: f'block {i}, {settings}: {m}')


@pytest.mark.parametrize('kind', [*BLOCKS, *KINDS])
def test_a_model_is_shown_saved_and_restored_as_the_dense_one(kind):
    arguments = (BLOCKS | KINDS)[kind]
    if 'distilled' in arguments:
        pytest.skip('of another class')
    torch.manual_seed(0)
    dense = timm.models.VisionTransformer(img_size=24, patch_size=4, embed_dim=24, depth=4, num_heads=3, **arguments)
    x, text, keys = images(dtype=torch.float32), repr(dense.blocks), list(dense.state_dict())
    logits, classes = dense(x), [type(module) for module in dense.modules()]
    model = evolve(dense)
    assert repr(model.blocks) == text and list(model.state_dict()) == keys
    assert torch.equal(restore(model)(x), logits)
    assert [type(module) for module in dense.modules()] == classes
    assert not any(hasattr(module, 'tap') for module in dense.modules())


# What acts on the weights


@torch.no_grad()
def test_a_hook_on_the_projection_acts_as_its_weights():
    hooked, tripled = build(**LAYERWISE), build(**LAYERWISE)
    for block, tripled_block in zip(hooked.blocks, tripled.blocks, strict=True):
        block.attn.qkv.register_forward_hook(lambda module, x, y: 3 * y)
        tripled_block.attn.qkv.weight.mul_(3)
        tripled_block.attn.qkv.bias.mul_(3)
    torch.testing.assert_close(hooked(images()), tripled(images()), rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_hook_on_the_norm_of_the_keys_acts_on_the_scores():
    hooked, scaled = build(**LAYERWISE, qk_norm=True), build(**LAYERWISE, qk_norm=True)
    for block, scaled_block in zip(hooked.blocks, scaled.blocks, strict=True):
        block.attn.k_norm.register_forward_hook(lambda module, x, y: 3 * y)
        scaled_block.attn.k_norm.weight.mul_(3)
        scaled_block.attn.k_norm.bias.mul_(3)
    torch.testing.assert_close(hooked(images()), scaled(images()), rtol=0, atol=1e-10)


@pytest.mark.filterwarnings('ignore:.*weight_norm.*:FutureWarning')
@pytest.mark.parametrize('change', [
    functools.partial(prune.l1_unstructured, name='weight', amount=0.3),
    nn.utils.weight_norm,
    nn.utils.spectral_norm,
    nn.utils.parametrizations.weight_norm,
    nn.utils.parametrizations.orthogonal,
], ids=['pruned', 'weight norm', 'spectral norm', 'weight norm by parametrization', 'orthogonal by parametrization'])
def test_projections_whose_weights_are_computed_train_and_infer(change):
    model = build(**LAYERWISE).train()
    for block in model.blocks:
        change(block.attn.qkv)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    state, model = model.state_dict(), model.eval()
    with torch.no_grad():
        logits = model(images())
    loaded = build(**LAYERWISE, seed=1).eval()
    for block in loaded.blocks:
        change(block.attn.qkv)
    loaded.load_state_dict(state)
    with torch.no_grad():
        first, second = loaded(images()), loaded(images())
    assert torch.equal(first, second)
    torch.testing.assert_close(first, logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize('fused', [True, False])
@torch.no_grad()
def test_half_precision_is_finite_where_the_dense_model_is(fused):
    """Products of queries and keys are beyond 65504 in the block that gives the first scores, scaled ones are not."""
    torch.manual_seed(0)
    dense = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=4, depth=6).half().eval()
    x = torch.randn(2, 3, 32, 32).half()
    attn = dense.blocks[0].attn
    attn.fused_attn = fused

    def products() -> Tensor:
        tokens = dense.blocks[0].norm1(dense._pos_embed(dense.patch_embed(x)))
        q, k, _ = attn.qkv(tokens).float().view(2, 65, 3, 3, 64).permute(2, 0, 3, 1, 4)
        return (q[:, :, 0].unsqueeze(2) * k).sum(dim=3)

    attn.qkv.weight[:2 * 192] *= (2e5 / products().abs().max()).sqrt().half()
    assert 1e5 < products().abs().max() < 3e5
    assert torch.isfinite(dense(x)).all()
    assert torch.isfinite(evolve(dense, selection='layer', start_block=1)(x)).all()


# Attentions without queries and keys for the tap


def attention_of_somebody(attn: nn.Module, x: Tensor, attn_mask=None, is_causal: bool = False) -> Tensor:
    """An attention as in code that shows attention maps, which does not call `q_norm`."""
    B, L, C = x.shape
    q, k, v = attn.qkv(x).reshape(B, L, 3, attn.num_heads, C // attn.num_heads).permute(2, 0, 3, 1, 4)
    return attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, C))


@pytest.mark.parametrize('training', [True, False])
def test_an_attention_that_never_calls_its_norms_is_scored_by_its_projection(training):
    model, plain = build(**LAYERWISE), build(**LAYERWISE)
    called = []
    for block in model.blocks:
        attn = block.attn
        attn.forward = lambda x, attn=attn, **kwargs: called.append(1) or attention_of_somebody(attn, x, **kwargs)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(model(images()), plain(images()), rtol=0, atol=1e-10)
    assert len(called) == len(model.blocks)


def test_a_block_that_was_put_in_later_is_scored():
    model, plain = build(**LAYERWISE), build(**LAYERWISE)
    model.blocks[3] = restore(build(**LAYERWISE)).blocks[3]
    torch.testing.assert_close(model(images()), plain(images()), rtol=0, atol=1e-10)


# What is left behind


def test_keys_are_not_kept_while_the_mlp_runs():
    model = build(**LAYERWISE)
    keys, kept = [], []
    for block in model.blocks:
        block.attn.k_norm.register_forward_hook(lambda module, x, y: keys.append(weakref.ref(y.untyped_storage())))
        block.mlp.register_forward_pre_hook(lambda module, x: kept.append(keys[-1]() is not None))
    with torch.no_grad():
        model(images())
    assert kept == [False] * len(model.blocks)


@pytest.mark.parametrize('training', [True, False])
def test_nothing_is_left_behind(training):
    model = build(**LAYERWISE)
    with torch.set_grad_enabled(training):
        model(images())
    assert nothing_is_left(model)


def test_nothing_is_left_behind_by_a_block_that_fails():
    model = build(**LAYERWISE)
    expected = model(images())

    def fail(module, x) -> None:
        raise MemoryError

    hook = model.blocks[4].mlp.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(images())
    assert nothing_is_left(model)
    hook.remove()
    assert torch.equal(model(images()), expected)


def test_a_model_that_runs_in_a_hook_of_another_leaves_it_alone():
    model, other = build(**LAYERWISE), build(seed=1, **LAYERWISE)
    expected = model(images())
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda module, x, y: (other(images()), None)[1])
    torch.testing.assert_close(model(images()), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize('qk_norm', [False, True])
def test_a_copy_has_its_own_tap(copied, qk_norm):
    model = build(**LAYERWISE, qk_norm=qk_norm)
    other = copied(model)
    assert torch.equal(other(images()), model(images()))
    assert not {id(tap) for tap in other._taps} & {id(tap) for tap in model._taps}
    assert other.blocks[2].attn.q_norm.tap is other._taps[2] is other.blocks[2].attn.k_norm.tap
    restore(other)
    assert other.blocks[2].attn.q_norm.__class__ is type(restore(model).blocks[2].attn.q_norm)


@pytest.mark.parametrize('kind', [*BLOCKS, *KINDS])
@pytest.mark.parametrize('use', ['a copy', 'inference', 'training'])
def test_a_model_without_references_leaves_memory_at_once(kind, use):
    def use_copy() -> list[weakref.ref]:
        other = copy.deepcopy(model)
        if use == 'inference':
            with torch.no_grad():
                other(images())
        if use == 'training':
            other.train()(images()).sum().backward()
        return [weakref.ref(module) for module in other.modules()]

    model = build(**LAYERWISE, **(BLOCKS | KINDS)[kind])
    gc.disable()  # which tensors do not hurry
    try:
        assert not [module for module in use_copy() if module() is not None]
    finally:
        gc.enable()


def test_a_norm_whose_attention_is_gone_leaves_the_block_to_be_projected_once_more():
    model, plain = build(**LAYERWISE, qk_norm=True), build(**LAYERWISE, qk_norm=True)
    attn = copy.copy(model.blocks[3].attn)  # has the same norms
    model.blocks[3].attn = attn
    assert attn.q_norm.attention() is None
    for each in (model, copy.deepcopy(model)):
        torch.testing.assert_close(each(images()), plain(images()), rtol=0, atol=1e-10)


# Checkpointing


def gradients(model: EvoVisionTransformer, forward=None) -> list[Tensor]:
    model.zero_grad()
    forward = model if forward is None else forward
    forward(images()).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize('kind', ['class token', 'qk norm, no class token', 'similarity'])
@pytest.mark.parametrize('how', [
    'by timm', 'by timm, reentrant', 'by a wrapper', 'by a wrapper, reentrant',
    pytest.param('compiled', marks=pytest.mark.slow)])
def test_gradients_are_those_without_checkpointing(kind, how, monkeypatch):
    model = build(selection='similarity') if kind == 'similarity' else build(**LAYERWISE, **KINDS[kind])
    expected = gradients(model)
    forward = None
    if 'timm' in how or how == 'compiled':
        model.set_grad_checkpointing()
    if how == 'by timm, reentrant':
        monkeypatch.setattr('timm.models._manipulate.use_reentrant_ckpt', lambda: True)
    if 'wrapper' in how:
        wrap_for_checkpointing(model, **(dict(checkpoint_impl=_reentrant()) if 'reentrant' in how else {}))
    if how == 'compiled':
        torch._dynamo.reset()
        forward = torch.compile(model, backend='aot_eager', fullgraph=True)
    for actual, wanted in zip(gradients(model, forward), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
    assert nothing_is_left(model)


def _reentrant():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl
    return CheckpointImpl.REENTRANT


# Threads


def run_in_threads(model, inputs: list[Tensor], times: int = 6) -> list[Tensor]:
    """Eight threads, each of which waits for the others before every call."""
    barrier = threading.Barrier(8)

    def run(x: Tensor) -> Tensor:
        barrier.wait(60)
        with torch.no_grad():
            return model(x)

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(run, inputs * times))


def compile_blocks(model: EvoVisionTransformer) -> EvoVisionTransformer:
    for block in model.blocks:
        block.compile(backend='aot_eager')
    return model


def compile_forwards(model: EvoVisionTransformer) -> EvoVisionTransformer:
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend='aot_eager')
    return model


def script(model: EvoVisionTransformer) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.jit.script(model)


def trace(model: EvoVisionTransformer) -> torch.jit.ScriptModule:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        return torch.jit.trace(model, images(2))


@pytest.mark.parametrize('prepare', [
    lambda model: model,
    lambda model: torch.compile(model, backend='aot_eager', fullgraph=True),
    compile_blocks,
    pytest.param(compile_forwards, marks=pytest.mark.slow),
    script,
    trace,
    lambda model: torch.export.export(model, (images(2),), dynamic_shapes=({0: ANY_SIZE},)).module(),
], ids=['eager', 'compiled', 'compiled blocks', 'compiled methods', 'scripted', 'traced', 'exported'])
@pytest.mark.parametrize('kind', ['class token', pytest.param('qk norm, no class token', marks=pytest.mark.slow)])
def test_threads_share_a_model(kind, prepare):
    torch._dynamo.reset()
    model = build(**LAYERWISE, **KINDS[kind]).eval()
    inputs = [torch.randn(2, 3, 24, 24, dtype=torch.float64) for _ in range(8)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        prepared = prepare(model)
        prepared(inputs[0])  # compilers are not asked to compile in several threads at once
    for actual, wanted in zip(run_in_threads(prepared, inputs), expected * 6, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9)


def test_threads_train_at_the_same_time():
    models = [build(seed=seed, **LAYERWISE) for seed in range(4)]
    expected = [gradients(model) for model in models]
    with ThreadPoolExecutor(4) as pool:
        for actual, wanted in zip(pool.map(gradients, models), expected, strict=True):
            for a, e in zip(actual, wanted, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


# TorchScript


@pytest.mark.parametrize('kind', [*BLOCKS, *KINDS])
def test_a_scripted_model_computes_the_same(kind):
    model = build(**LAYERWISE, depth=4, **(BLOCKS | KINDS)[kind]).eval()
    buffer = io.BytesIO()
    torch.jit.save(script(model), buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(images()), model(images()), rtol=0, atol=1e-9)
    assert model.blocks[3].attn.q_norm.tap is model._taps[3] if hasattr(model.blocks[3], 'attn') else True


def test_a_scale_that_is_changed_later_counts():
    model, evolved_later = build(**LAYERWISE), build(**LAYERWISE)
    restore(evolved_later)
    for each in (model, evolved_later):
        for block in each.blocks:
            block.attn.scale *= 3
            block.attn.fused_attn = False
    assert torch.equal(model.forward_features(images()), evolve(evolved_later, **LAYERWISE).forward_features(images()))


def test_a_norm_that_was_put_in_later_leaves_the_block_to_be_projected_once_more():
    model, plain = build(**LAYERWISE), build(**LAYERWISE)
    model.blocks[3].attn.q_norm = nn.Identity()
    torch.testing.assert_close(model(images()), plain(images()), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_a_hook_in_a_compiled_block_may_call_another_model():
    model, other = compile_blocks(build(**LAYERWISE)).eval(), compile_blocks(build(seed=1, **LAYERWISE)).eval()
    with torch.no_grad():
        expected = model(images())
        model.blocks[3].attn.register_forward_hook(lambda module, x, y: (other(images()), None)[1])
        torch._dynamo.reset()
        with ThreadPoolExecutor(2) as pool:
            for logits in pool.map(model, [images()] * 2, timeout=120):
                torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


# Blocks that run outside of the model


@pytest.fixture
def alone():
    """Number of warnings of a block that other code calls."""
    taps._warn_of_own_loop.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        yield lambda: sum('outside of the forward pass' in str(warning.message) for warning in caught)


@pytest.mark.parametrize('kind', ['class token', 'parallel branches', 'similarity', 'rotations'])
def test_a_loop_of_the_user_over_the_blocks_is_warned_of_once(kind, alone):
    model = build_any(kind)
    x, rope = model._embed(images())
    assert alone() == 0
    for _ in range(2):
        for block in model.blocks:
            x = block(x) if rope is None else block(x, rope=rope)
    assert alone() == 1


def test_a_norm_that_has_lost_its_attention_is_called_without_a_warning(alone):
    """As an older torch calls a copy of it, to find the shape of what it returns."""
    norm = copy.deepcopy(build().blocks[0].attn.q_norm)
    gc.collect()  # the attention that was copied along
    assert norm.attention() is None
    norm(torch.randn(1, 3, 5, 8))
    assert alone() == 0


def build_any(kind: str):
    if kind == 'rotations':
        return evolve(timm.create_model(
            'eva02_tiny_patch14_224', img_size=24, patch_size=4, embed_dim=48, depth=4, num_heads=3).double())
    kinds = BLOCKS | KINDS | {'similarity': dict(selection='similarity')}
    return build(**kinds[kind])


@pytest.mark.parametrize('use', [
    lambda model: model(images()),
    lambda model: model.forward_intermediates(images(), stop_early=True, indices=[1]),
    lambda model: [model(images()) for _ in range(2) if model.blocks.register_forward_hook(lambda *args: None)],
    lambda model: gradients(model),
    lambda model: (model.set_grad_checkpointing(), gradients(model)),
    lambda model: (wrap_for_checkpointing(model), gradients(model)),
    lambda model: (wrap_for_checkpointing(model, checkpoint_impl=_reentrant()), gradients(model)),
    lambda model: torch.fx.symbolic_trace(model, concrete_args=dict(attn_mask=None, is_causal=False))(images()),
    lambda model: torch.jit.trace(model, images())(images()),
    pytest.param(lambda model: torch.compile(model, backend='aot_eager')(images()), marks=pytest.mark.slow),
    pytest.param(lambda model: compile_blocks(model)(images()), marks=pytest.mark.slow),
    pytest.param(
        lambda model: (break_graphs(model), torch.compile(model, backend='aot_eager')(images())),
        marks=pytest.mark.slow),
    lambda model: copy.deepcopy(model)(images()),
    lambda model: timm_evo.trace(model, images()),
    lambda model: restore(model)(images()),
], ids=[
    'forward', 'intermediates', 'hooks on blocks', 'backward', 'checkpointed', 'wrapped', 'wrapped, reentrant', 'fx',
    'traced', 'compiled', 'compiled blocks', 'broken graphs', 'copied', 'looked at', 'restored'])
@pytest.mark.parametrize('selection', ['similarity', 'layer'])
def test_the_model_itself_is_not_warned_of(selection, use, alone):
    torch._dynamo.reset()
    model = build(selection=selection)
    use(model)
    assert alone() == 0


def wrap_for_checkpointing(model, **options) -> None:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block, **options)


def break_graphs(model) -> None:
    for block in model.blocks:
        block.attn.qkv.register_forward_pre_hook(lambda *args: torch._dynamo.graph_break())
