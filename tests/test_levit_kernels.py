"""Kernels of LeViT against the tensor steps that they take the place of: on a GPU if there is one, else in Triton's
interpreter, which `conftest.py` asks for."""
import pytest
import timm
import torch
from test_cuda import can_go_without_a_gpu
from test_kernels import DEVICE, random, tolerance
from this_torch import run_without_interpreter, skip_without_kernels
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import timm_evo
from timm_evo.kernels.choice import launch
from timm_evo.method import published
from timm_evo.method.class_attention import downsampled_class_attention, mean_attention
from timm_evo.models import levit_attention
from timm_evo.models.levit_attention import gather_biases

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEIGHT, WIDTH = 7, 5
NUM_PATCHES = HEIGHT * WIDTH


@pytest.fixture(autouse=True)
def kernels_wherever_they_can(monkeypatch):
    monkeypatch.setenv('TIMM_EVO_KERNELS', '1')
    skip_without_kernels()


def relative_positions(height: int, width: int, stride: int = 1) -> Tensor:
    """Number of the relative position of each query and key (M, N), of which there are N."""
    row = torch.arange(height * width) // width
    column = torch.arange(height * width) % width
    left = (row % stride == 0) & (column % stride == 0)
    return ((row[left, None] - row).abs() * width + (column[left, None] - column).abs()).to(DEVICE)


def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        biases: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Values (B, Q, H * v) and attention (H * B, Q, L) of a query, a key and a value (B, L, H, d), in float32."""
    query, key, value = (x.float().transpose(1, 2) for x in (query, key, value))
    logits = query @ key.transpose(2, 3) * scale
    attention = (logits if biases is None else logits + biases).softmax(dim=3)
    return (attention @ value).transpose(1, 2).flatten(2), attention.transpose(0, 1).flatten(0, 1)


class TestAttention:
    """Biases and scores by place, against a matrix of all biases and one of all attention."""

    @pytest.mark.parametrize('dtype', DTYPES)
    @pytest.mark.parametrize('batch_size', [1, 3])
    @pytest.mark.parametrize('num_heads, key_dim, val_dim', [(3, 16, 32), (2, 32, 64), (1, 64, 128)])
    def test_of_the_whole_grid(self, num_heads, key_dim, val_dim, batch_size, dtype):
        qkv = random(batch_size, NUM_PATCHES, num_heads * (2 * key_dim + val_dim), dtype=dtype)
        table, index = random(num_heads, NUM_PATCHES, dtype=dtype, seed=1), relative_positions(HEIGHT, WIDTH)
        out, paid = launch(
            'levit_attention', qkv, qkv, num_heads, key_dim, val_dim, 0.3, table, index, None, NUM_PATCHES, NUM_PATCHES)
        parts = qkv.unflatten(2, (num_heads, -1)).split([key_dim, key_dim, val_dim], dim=3)
        expected, attention = attend(*parts, 0.3, table.float()[:, index])
        assert out.dtype == dtype and out.is_contiguous()
        torch.testing.assert_close(out.float(), expected, **tolerance(dtype))
        torch.testing.assert_close(
            launch('levit_scores', paid, None, num_heads * NUM_PATCHES, 0.5, None, 0, 0, 1),
            mean_attention(attention, num_heads, NUM_PATCHES, False), **tolerance(dtype))

    @pytest.mark.parametrize('dtype', DTYPES)
    @pytest.mark.parametrize('batch_size', [1, 3])
    @pytest.mark.parametrize('representative', [False, True])
    @pytest.mark.parametrize('num_slow', [1, 16, 20])
    def test_of_a_selection(self, num_slow, representative, batch_size, dtype):
        slow = random(batch_size, NUM_PATCHES, seed=2).argsort(dim=1)[:, :num_slow]
        qkv = random(batch_size, num_slow + representative, 2 * 64, dtype=dtype)
        table, index = random(2, NUM_PATCHES, dtype=dtype, seed=1), relative_positions(HEIGHT, WIDTH)
        scores = random(batch_size, num_slow, seed=3).sigmoid()
        out, paid = launch('levit_attention', qkv, qkv, 2, 16, 32, 0.3, table, index, slow, num_slow, num_slow)
        biases, = gather_biases([table.float()], index, slow, representative)
        parts = qkv.unflatten(2, (2, -1)).split([16, 16, 32], dim=3)
        expected, attention = attend(*parts, 0.3, biases.unflatten(0, (2, batch_size)).transpose(0, 1))
        torch.testing.assert_close(out.float(), expected, **tolerance(dtype))
        torch.testing.assert_close(
            launch('levit_scores', paid, scores, 2 * num_slow, 0.6, None, 0, 0, 1),
            published.global_class_attention(scores, mean_attention(attention, 2, num_slow, False), 0.6),
            **tolerance(dtype))

    @pytest.mark.parametrize('dtype', DTYPES)
    @pytest.mark.parametrize('representative', [False, True])
    def test_of_a_class_token_without_biases(self, representative, dtype):
        qkv, scores = random(2, 21 + representative, 3 * 64, dtype=dtype), random(2, 21, seed=3).sigmoid()
        out, paid = launch('levit_attention', qkv, qkv, 3, 16, 32, 0.3, None, None, None, 21, 1)
        expected, attention = attend(*qkv.unflatten(2, (3, -1)).split([16, 16, 32], dim=3), 0.3, None)
        torch.testing.assert_close(out.float(), expected, **tolerance(dtype))
        learned = torch.tensor([-0.4], device=DEVICE)
        torch.testing.assert_close(
            launch('levit_scores', paid, scores, 3, 0.5, learned, 1, 0, 1),
            published.global_class_attention(scores, mean_attention(attention, 3, 21, True), 0.5, learned),
            **tolerance(dtype))

    @pytest.mark.parametrize('dtype', DTYPES)
    @pytest.mark.parametrize('batch_size', [1, 3])
    @pytest.mark.parametrize('class_token', [False, True])
    @pytest.mark.parametrize('height, width', [(7, 5), (4, 6), (14, 14)])
    def test_that_downsamples(self, height, width, class_token, batch_size, dtype):
        num_tokens = class_token + height * width
        index = relative_positions(height, width, stride=2)
        num_left = class_token + index.shape[0]
        query, kv = random(batch_size, num_left, 2 * 16, dtype=dtype), random(
            batch_size, num_tokens, 2 * (16 + 64), dtype=dtype, seed=1)
        table = None if class_token else random(2, height * width, dtype=dtype, seed=2)
        num_paying = 1 if class_token else num_left
        out, paid = launch(
            'levit_attention', query, kv, 2, 16, 64, 0.3, table, None if class_token else index, None, num_tokens,
            num_paying)
        parts = query.unflatten(2, (2, -1)), *kv.unflatten(2, (2, -1)).split([16, 64], dim=3)
        expected, attention = attend(*parts, 0.3, None if table is None else table.float()[:, index])
        torch.testing.assert_close(out.float(), expected, **tolerance(dtype))
        scores = random(batch_size, num_tokens, seed=3).sigmoid()
        evolved = published.global_class_attention(
            scores, mean_attention(attention, 2, num_tokens, class_token), 0.4)
        torch.testing.assert_close(
            launch('levit_scores', paid, scores, 2 * num_paying, 0.4, None, int(class_token), width, 2),
            downsampled_class_attention(scores, evolved, (height, width), 2, int(class_token)), **tolerance(dtype))

    @pytest.mark.parametrize('dtype', DTYPES)
    @pytest.mark.parametrize('num_tokens', [256, 257, 289])  # the keys are one block, or several
    def test_of_large_grids(self, num_tokens, dtype):
        index = relative_positions(17, 17)
        slow = torch.arange(288, 288 - num_tokens, -1, device=DEVICE).expand(1, -1)
        qkv, table = random(1, num_tokens, 64, dtype=dtype), random(1, 289, dtype=dtype, seed=1)
        out, paid = launch('levit_attention', qkv, qkv, 1, 16, 32, 0.3, table, index, slow, num_tokens, num_tokens)
        parts = qkv.unflatten(2, (1, -1)).split([16, 16, 32], dim=3)
        expected, attention = attend(*parts, 0.3, gather_biases([table.float()], index, slow, False)[0][:, None])
        torch.testing.assert_close(out.float(), expected, **tolerance(dtype))
        torch.testing.assert_close(
            launch('levit_scores', paid, None, num_tokens, 0.5, None, 0, 0, 1),
            mean_attention(attention, 1, num_tokens, False), **tolerance(dtype))

    def test_large_products_do_not_overflow(self):
        qkv = 100 * random(1, 20, 64, dtype=torch.float16)
        out, paid = launch('levit_attention', qkv, qkv, 1, 16, 32, 1., None, None, None, 20, 20)
        assert out.isfinite().all() and paid.isfinite().all()

    def test_no_scores_are_computed_where_none_are_wanted(self):
        qkv = random(1, 20, 64)
        out, paid = launch('levit_attention', qkv, qkv, 1, 16, 32, 1., None, None, None, 0, 0)
        scored, _ = launch('levit_attention', qkv, qkv, 1, 16, 32, 1., None, None, None, 20, 20)
        assert torch.equal(out, scored) and paid.numel() == 0

    def test_operations_are_counted(self):
        qkv = random(2, 20, 2 * 64)
        with FlopCounterMode(display=False) as counter:
            launch('levit_attention', qkv, qkv, 2, 16, 32, 1., None, None, None, 0, 0)
        assert counter.get_total_flops() == 2 * 2 * 2 * 20 * 20 * (16 + 32)


LEVIT = dict(img_size=(80, 112), embed_dim=(32, 48, 64), num_heads=(2, 3, 2), depth=(2, 2, 1), num_classes=5)
SETTINGS = {
    'stage': dict(),
    'layer': dict(selection='layer', start_block=1),
    'from the first stage on': dict(start_block=1, keep_ratio=0.6),
    'without fast update': dict(fast_update=False, learn_tradeoff=False, start_block=1),
    'learned trade-off': dict(learn_tradeoff=True),
    'all tokens': dict(keep_ratio=1.),
}


def levit(name: str = 'evo_levit_128s', **settings) -> nn.Module:
    """A small one, whose tokens attend to each other unevenly."""
    torch.manual_seed(0)
    model = timm.create_model(name, **LEVIT, **settings).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith('attention_biases'):
                nn.init.normal_(parameter)
            elif '.bn.weight' in key:
                nn.init.uniform_(parameter, 0.5, 1.5)
            elif key.endswith('linear.weight'):
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.to(DEVICE)


def images(batch_size: int = 2) -> Tensor:
    return random(batch_size, 3, *LEVIT['img_size'], seed=1)


def forbidden(*args, **kwargs):
    raise AssertionError('this is for the tensor steps')


class TestWholeModels:

    @pytest.mark.parametrize('name', ['evo_levit_128s', 'evo_levit_cls_128s'])
    @pytest.mark.parametrize('settings', SETTINGS.values(), ids=SETTINGS.keys())
    @torch.no_grad()
    def test_equal_the_tensor_steps(self, name, settings, monkeypatch):
        model = levit(name, **settings)
        x = images()
        with monkeypatch.context() as kernels:
            for step in ('gather_biases', '_attend', '_score', '_gather_values'):
                kernels.setattr(levit_attention, step, forbidden)
            by_kernels = model(x), timm_evo.trace(model, x)
        monkeypatch.setenv('TIMM_EVO_KERNELS', '0')
        by_steps = model(x), timm_evo.trace(model, x)
        torch.testing.assert_close(by_kernels[0], by_steps[0], rtol=1e-4, atol=1e-4)
        for one, other in zip(by_kernels[1], by_steps[1], strict=True):
            assert torch.equal(one.slow, other.slow) and torch.equal(one.follows, other.follows)
            torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-6)

    @torch.no_grad()
    def test_no_result_depends_on_what_shares_its_batch(self):
        model = levit()
        x = images(batch_size=3)
        together = model.forward_features(x)
        assert torch.equal(together, model.forward_features(x))  # the same bits twice
        torch.testing.assert_close(together[:2], model.forward_features(x[:2]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together[:1], model.forward_features(x[:1]), rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_half_precision(self):
        model = levit().bfloat16()
        x = images().bfloat16()
        assert model(x).isfinite().all()
        with torch.autocast(DEVICE, torch.bfloat16):
            assert levit()(x.float()).isfinite().all()

    @torch.no_grad()
    def test_biases_are_read_from_the_parameter(self):
        """timm's dense LeViT keeps those of before until it is trained or moved."""
        model = levit(keep_ratio=1.)
        x = images()
        before = model(x)
        for attn in model._attentions():
            attn.attention_biases.add_(random(*attn.attention_biases.shape))
        assert not torch.allclose(model(x), before)

    def test_a_gradient_of_the_biases_alone(self):
        """No kernel runs where one reaches the biases, though none reaches the tokens."""
        model = levit().requires_grad_(False)
        for attn in model._attentions():
            attn.attention_biases.requires_grad_()
        model(images()).sum().backward()
        assert all(attn.attention_biases.grad.abs().sum() > 0 for attn in model._attentions())


@pytest.mark.skipif(not can_go_without_a_gpu(), reason='this torch wants a GPU for tensors without values, too')
def test_an_evolved_model_launches_less_than_a_dense_one():
    """Eager LeViTs wait for launches, not for numbers."""
    names = ('levit_128s', 'levit_256', 'levit_384')
    counts = {
        (name, selection): int(number)
        for name, selection, number in run_without_interpreter('count_operators.py', *names)}
    assert counts['levit_128s', 'stage'] <= 180 < 250 < counts['levit_128s', 'dense']
    for name in names:
        assert counts[name, 'stage'] < 0.75 * counts[name, 'dense'] and counts[name, 'layer'] < counts[name, 'dense']
