"""The last block computes no more than the head reads, and nobody can tell but by the time it takes."""
import pytest
import torch
from test_method import KINDS, build
from torch import Tensor, nn

from timm_evo import short_block
from timm_evo.vision_transformer import TokenEvolution

# those with a token for the head, and attention that can be folded
SHORT = ['class token', 'registers', 'layer scale', 'no qkv bias', 'distilled']


def images(batch_size: int = 3) -> Tensor:
    return torch.randn(batch_size, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def long_forward(model: TokenEvolution, x: Tensor) -> Tensor:
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

    def spy(block, x, num_tokens):
        seen.append(num_tokens)
        return forward_first(block, x, num_tokens)

    monkeypatch.setattr(short_block, 'forward_first', spy)
    return seen


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('selection', ['stage', 'layer'])
@pytest.mark.parametrize('kind', SHORT)
def test_logits_and_gradients_are_those_of_the_whole_block(kind, selection, training, lengths):
    for seed, keep_ratio in enumerate((0.3, 0.7, 1.0)):
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
def test_dropped_attention_loses_its_values_and_their_bias(qkv_bias, lengths):
    model = build(qkv_bias=qkv_bias)
    model.blocks[-1].attn.fused_attn = False  # the fused attention never calls the module
    model.blocks[-1].attn.attn_drop = FixedDrop()
    torch.testing.assert_close(model(images()), long_forward(model, images()), rtol=0, atol=1e-10)
    assert lengths == [1]


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


class LowRank(nn.Module):
    """A low-rank adapter in the place of a projection: the weight alone is not the projection any more."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.weight, self.bias = linear.weight, linear.bias
        self.down = nn.Linear(linear.in_features, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, linear.out_features, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


def test_a_replaced_projection_is_used(lengths):
    model = build()
    before = model(images())
    model.blocks[-1].attn.qkv = LowRank(model.blocks[-1].attn.qkv)
    after = model(images())
    torch.testing.assert_close(after, long_forward(model, images()), rtol=0, atol=1e-10)
    assert (after - before).abs().max() > 1e-3
    assert lengths == [1]


@pytest.mark.parametrize('place', ['', 'attn', 'attn.qkv', 'mlp'])
def test_hooks_see_every_token(place, lengths):
    model = build()
    shapes = []
    hook = model.blocks[-1].get_submodule(place).register_forward_hook(lambda module, x, y: shapes.append(y.shape))
    hooked = model(images())
    assert len(shapes) == 1 and shapes[0][1] == 1 + 18 + 1  # class token, half of the patches, representative
    assert lengths == []
    hook.remove()
    torch.testing.assert_close(model(images()), hooked, rtol=0, atol=1e-10)
    assert lengths == [1]
