"""The last block computes only what the head reads, and the only visible difference is the time."""
import pytest
import torch
from test_method import KINDS, build
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from timm.utils import AttentionExtract
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from timm_evo import EvoVisionTransformer
from timm_evo.models import short_block
from timm_evo.models.flat import FlatModel

# those with a token for the head, and attention that can be folded
SHORT = ['class token', 'registers', 'layer scale', 'no qkv bias', 'distilled']


def images(batch_size: int = 3) -> Tensor:
    return torch.randn(batch_size, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def long_forward(model: FlatModel, x: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(x))


class FixedDrop(nn.Module):
    """Drops the attention to the same tokens always, as dropout does at random."""

    def forward(self, attention: Tensor) -> Tensor:
        return attention * (torch.arange(attention.shape[-1]) % 3 > 0) * 1.5


@pytest.fixture
def lengths(monkeypatch) -> list[int]:
    """Number of tokens that come out of the last block, call by call, where it is short."""
    seen = []
    forward_first = short_block.forward_first

    def spy(block, x, num_tokens, *mask):
        seen.append(num_tokens)
        return forward_first(block, x, num_tokens, *mask)

    monkeypatch.setattr(short_block, 'forward_first', spy)
    return seen


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('selection', ['stage', 'layer', 'similarity'])
@pytest.mark.parametrize('kind', SHORT)
def test_logits_and_gradients_are_those_of_the_whole_block(kind, selection, training, lengths):
    lowest = 0.4 if selection == 'similarity' else 0.3  # at most half of the tokens go at a time
    for seed, keep_ratio in enumerate((lowest, 0.7, 1.0)):
        model = build(seed=seed, **KINDS[kind], selection=selection, keep_ratio=keep_ratio, start_block=2)
        model.train(training)
        short, long = model(images()), long_forward(model, images())
        torch.testing.assert_close(short, long, rtol=0, atol=1e-10)
        gradients = (torch.autograd.grad(logits.square().sum(), list(model.parameters())) for logits in (short, long))
        for (name, _), actual, expected in zip(model.named_parameters(), *gradients, strict=True):
            scale = max(1., expected.abs().max().item())
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * scale, msg=name)
    assert lengths == [2 if kind == 'distilled' else 1] * 3


def test_drop_path_drops_the_same_images(lengths):
    model = build(drop_path_rate=0.6, init_values=0.5).train()
    outputs = []
    for forward in (model, lambda x: long_forward(model, x)):
        torch.manual_seed(3)
        outputs.append(forward(images(8)))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)
    assert lengths == [1]


@pytest.mark.parametrize('qkv_bias', [True, False])
def test_dropped_attention_loses_its_values_and_their_bias(qkv_bias):
    block = build(qkv_bias=qkv_bias).blocks[-1]
    block.attn.fused_attn = False  # the fused attention never calls the module
    block.attn.attn_drop = FixedDrop()
    x = torch.randn(3, 20, 24, dtype=torch.float64)
    torch.testing.assert_close(short_block.forward_first(block, x, 2), block(x)[:, :2], rtol=0, atol=1e-10)


@pytest.mark.parametrize('dropped', ['attn.attn_drop', 'attn.proj_drop', 'mlp.drop1', 'mlp.drop2'])
def test_every_dropout_is_applied(dropped):
    model = build().train()
    model.blocks[-1].attn.fused_attn = False
    model.blocks[-1].get_submodule(dropped).p = 1.
    torch.testing.assert_close(model(images()), long_forward(model, images()), rtol=0, atol=1e-10)


@pytest.mark.parametrize('global_pool', ['', 'avg', 'map'])
def test_a_head_that_reads_more_gets_more(global_pool, lengths):
    model = build(global_pool=global_pool)
    torch.testing.assert_close(model(images()), long_forward(model, images()), rtol=0, atol=1e-10)
    assert lengths == []


def test_the_pooling_of_the_moment_counts(lengths):
    model = build()
    model.reset_classifier(5, 'avg')
    model.double()(images())
    assert lengths == []
    model.reset_classifier(5, 'token')
    model.double()(images())
    assert lengths == [1]


@pytest.mark.parametrize('model', [
    dict(qk_norm=True),
    dict(scale_attn_norm=True),
])
def test_another_attention_goes_through_the_block_as_it_is(model, lengths):
    try:
        model = build(**model)
    except TypeError:
        pytest.skip('this timm has no such argument')
    torch.testing.assert_close(model(images()), long_forward(model, images()), rtol=0, atol=1e-10)
    assert lengths == []


# No visible difference


def watch_with_hook(method: str, place: str):
    """Places a hook that notes the number of tokens that come by."""

    def watch(model: FlatModel, seen: list[int]) -> None:
        def hook(module, *values):
            tensors = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
            seen.extend(v.shape[1] for v in tensors if isinstance(v, Tensor) and v.dim() == 3)

        getattr(model.get_submodule(place), method)(hook)

    return watch


def watch_with_own_forward(place: str):
    """Replaces `forward` of one module, as attention maps are usually taken."""

    def watch(model: FlatModel, seen: list[int]) -> None:
        module = model.get_submodule(place)
        forward = module.forward

        def own_forward(x, *args, **kwargs):
            seen.append(x.shape[-2])
            return forward(x, *args, **kwargs)

        module.forward = own_forward

    return watch


def watch_with_module(place: str):
    """Replaces a module by one of another origin."""

    class Watching(nn.Module):
        def __init__(self, module: nn.Module, seen: list[int]) -> None:
            super().__init__()
            self.module, self.seen = module, seen

        def forward(self, x: Tensor, **kwargs) -> Tensor:
            self.seen.append(x.shape[1])
            return self.module(x, **kwargs)

    def watch(model: FlatModel, seen: list[int]) -> None:
        parent, _, name = place.rpartition('.')
        setattr(model.get_submodule(parent), name, Watching(model.get_submodule(place), seen))

    return watch


def watch_with_method(name: str):
    """Replaces a method of the instance."""

    def watch(model: FlatModel, seen: list[int]) -> None:
        method = getattr(model, name)

        def own_method(x, *args, **kwargs):
            out = method(x, *args, **kwargs)
            seen.append((out if name == 'forward_features' else x).shape[1])
            return out

        setattr(model, name, own_method)

    return watch


HOOKS = ['register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook',
         'register_full_backward_pre_hook']
LAST = 'blocks.6'
WATCHERS = {
    **{f'{hook} on {place}': watch_with_hook(hook, place)
       for hook in HOOKS for place in ('norm', LAST, f'{LAST}.attn', f'{LAST}.attn.qkv', f'{LAST}.mlp')},
    **{f'own forward of {place}': watch_with_own_forward(place)
       for place in ('norm', LAST, f'{LAST}.attn', f'{LAST}.attn.q_norm', f'{LAST}.mlp.fc2')},
    **{f'another {place}': watch_with_module(place)
       for place in ('norm', LAST, f'{LAST}.attn', f'{LAST}.attn.qkv', f'{LAST}.mlp')},
    **{f'own {name}': watch_with_method(name) for name in ('forward_features', 'forward_head', 'pool')},
}


@pytest.mark.parametrize('selection', ['stage', 'similarity'])
@pytest.mark.parametrize('watcher', WATCHERS)
def test_hooks_and_replaced_methods_get_every_token(watcher, selection, lengths):
    model, plain = build(selection=selection), build(selection=selection)
    seen = []
    WATCHERS[watcher](model, seen)
    logits = model(images())
    logits.sum().backward()
    # class token, the patches that are present, and in published selections the representative token
    present = {int(share * 36) for share in model.schedule.keep_ratio}
    num_last = 1 + 18 + 1 if selection == 'stage' else 1 + min(present)
    allowed = {1 + 36, num_last}
    if selection == 'similarity' and watcher.endswith(' norm'):  # which tells who is alike, too
        allowed |= {1 + number for number in present}
    assert seen and set(seen) <= allowed, 'all tokens are seen'
    assert lengths == []
    torch.testing.assert_close(logits, plain(images()), rtol=0, atol=1e-10)
    assert lengths == [1]


@pytest.mark.parametrize('register', [
    nn.modules.module.register_module_forward_hook,
    nn.modules.module.register_module_forward_pre_hook,
    nn.modules.module.register_module_full_backward_hook,
])
def test_hooks_on_all_modules_see_every_token(register, lengths):
    seen = []
    handle = register(lambda module, *values: seen.append(type(module).__name__))
    model = build()
    try:
        model(images()).sum().backward()
    finally:
        handle.remove()
    assert seen.count('Mlp') == len(model.blocks)
    assert lengths == []


@pytest.mark.parametrize('register', HOOKS)
def test_hooks_on_the_blocks_see_what_goes_in_and_what_comes_out(register, lengths):
    model, plain = build(), build()
    shapes = []

    def hook(module, *values):
        assert module[0] is model.blocks[0]
        shapes.extend(v.shape for value in values for v in (value if isinstance(value, tuple) else (value,)))

    handle = getattr(model.blocks, register)(hook)
    logits = model(images())
    logits.sum().backward()
    assert shapes and set(shapes) == {(3, 37, 24)} and lengths == []
    handle.remove()
    torch.testing.assert_close(logits, plain(images()), rtol=0, atol=1e-10)
    model(images())
    assert lengths == [1, 1]


def test_a_compiled_last_block_is_called(lengths):
    model = build()
    expected = model(images())
    calls = []
    model.blocks[-1].compile(backend=lambda graph, _: lambda *x: calls.append(1) or graph(*x))
    torch.testing.assert_close(model(images()), expected, rtol=0, atol=1e-10)
    assert calls and lengths == [1]


def test_a_method_that_is_replaced_in_a_class_of_timm_is_called(lengths, monkeypatch):
    model = build()
    model(images())
    calls = []
    for cls in (Attention, Block, Mlp):
        forward = cls.forward

        def replaced(self, *args, forward=forward, **kwargs):
            calls.append(1)
            return forward(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(cls, 'forward', replaced)
            calls.clear()
            model(images())
        assert len(calls) == len(model.blocks) and lengths == [1]


class MeanHead(EvoVisionTransformer):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x[:, 1:].mean(dim=1))


class DoubledFeatures(EvoVisionTransformer):
    def forward_features(self, x: Tensor) -> Tensor:
        return 2 * super().forward_features(x)


class MaxPool(EvoVisionTransformer):
    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return x[:, 1:].amax(dim=1)


@pytest.mark.parametrize('cls', [MeanHead, DoubledFeatures, MaxPool])
def test_a_subclass_with_an_own_way_to_its_logits_keeps_it(cls, lengths):
    model = cls(img_size=24, patch_size=4, embed_dim=24, depth=6, num_heads=3, num_classes=5)
    logits = model(images().float())
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits, model.forward_head(model.forward_features(images().float())))
    assert lengths == []


def test_symbolic_tracing_finds_every_node_of_the_last_block():
    model = build()
    for block in model.blocks:
        block.attn.fused_attn = False
    extract = AttentionExtract(model.eval(), names=['blocks.*.attn.softmax'], method='fx')
    maps = extract(images())
    assert [attention.shape[-1] for attention in maps.values()] == [37] * 2 + [20] * 5
    nodes = create_feature_extractor(model, ['norm', f'{LAST}.mlp.fc2'])(images())
    assert nodes['norm'].shape == (3, 37, 24) and nodes[f'{LAST}.mlp.fc2'].shape == (3, 20, 24)
