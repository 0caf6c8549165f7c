"""The method: what a model computes, against an obvious implementation, and what follows from its definition."""
import random

import pytest
import timm
import torch
from slow_evolution import assert_equal_after_every_block, assert_equal_gradients, evolve_slowly
from torch import nn

from timm_evo import EvoVisionTransformer, EvoVisionTransformerDistilled
from timm_evo.method import published
from timm_evo.method.schedule import make_schedule, segments

SMALL = dict(img_size=24, patch_size=4, embed_dim=24, depth=7, num_heads=3, num_classes=5)
KINDS = {
    'class token': dict(),
    'registers': dict(reg_tokens=3),
    'no class token': dict(class_token=False, global_pool='avg'),
    'registers only': dict(class_token=False, reg_tokens=2, global_pool='avg'),
    'layer scale': dict(init_values=0.5),
    'qk norm': dict(qk_norm=True),
    'qk norm, no class token': dict(qk_norm=True, class_token=False, global_pool='avg'),
    'no qkv bias': dict(qkv_bias=False, pre_norm=True),
    'distilled': dict(distilled=True),
}


def build(distilled: bool = False, seed: int = 0, selection: str = 'stage', **kwargs) -> EvoVisionTransformer:
    """A small model in float64, with weights far enough from zero for attention to differ between tokens."""
    torch.manual_seed(seed)
    cls = EvoVisionTransformerDistilled if distilled else EvoVisionTransformer
    model = cls(**(SMALL | kwargs), selection=selection).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def random_settings(seed: int) -> dict:
    rng = random.Random(seed)
    depth, start_block, stage_depth = SMALL['depth'], rng.randint(1, 6), rng.randint(1, 4)
    selection = rng.choice(['stage', 'layer'])
    num_segments = len(segments(depth, start_block, stage_depth if selection == 'stage' else 1))
    return dict(
        start_block=start_block,
        stage_depth=stage_depth,
        selection=selection,
        fast_update=rng.random() < 0.7,
        keep_ratio=rng.choice([rng.uniform(0.05, 0.95), [rng.choice([0.2, 0.6, 1.0]) for _ in range(num_segments)]]),
        tradeoff=rng.choice([rng.random(), [rng.choice([0.0, 0.4, 1.0]) for _ in range(depth)]]),
    )


def slow_arguments(settings: dict) -> dict:
    """Settings as the slow implementation takes them, worked out independently."""
    depth, start = SMALL['depth'], settings['start_block']
    step = settings['stage_depth'] if settings['selection'] == 'stage' else 1
    firsts = list(range(start, depth, step))
    ratio, alpha = settings['keep_ratio'], settings['tradeoff']
    return dict(
        keep_ratios=dict(zip(firsts, ratio if isinstance(ratio, list) else [ratio] * len(firsts), strict=True)),
        tradeoff=alpha if isinstance(alpha, list) else [1.0] * start + [alpha] * (depth - start),
        fast_update=settings['fast_update'],
    )


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('seed', range(4))
@torch.no_grad()
def test_equals_the_obvious_implementation(kind, seed):
    settings = random_settings(100 * seed + list(KINDS).index(kind))
    model = build(seed=seed, **KINDS[kind], **settings)
    images = torch.randn(3, 3, 24, 24, dtype=torch.float64)

    expected = evolve_slowly(model, images, **slow_arguments(settings))
    assert_equal_after_every_block(model, images, expected, str(settings))


@pytest.mark.parametrize('kind', ['class token', 'no class token', 'qk norm', 'distilled'])
@pytest.mark.parametrize('seed', range(2))
def test_gradients_equal_the_obvious_implementation(kind, seed):
    settings = random_settings(seed) | dict(fast_update=True, keep_ratio=0.4)
    model = build(seed=seed, **KINDS[kind], **settings)
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    expected = model.forward_head(model.norm(evolve_slowly(model, images, **slow_arguments(settings))[-1]))
    assert_equal_gradients(model, model(images), expected)


@pytest.mark.parametrize('name', ['deit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224', 'test_vit'])
def test_keep_ratio_one_is_the_dense_model(name):
    dense = timm.create_model(name)
    evolved = timm.create_model(f'evo_{name}', keep_ratio=1.0)
    evolved.load_state_dict(dense.state_dict(), strict=True)
    images = torch.randn(2, *dense.default_cfg['input_size'])

    logits = [model.eval()(images) for model in (dense, evolved)]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)
    for model, out in zip((dense, evolved), logits, strict=True):
        out.square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    for a, e in zip(evolved.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize('settings', [
    dict(),
    dict(keep_ratio=0.3, selection='layer'),
    dict(selection='stage', fast_update=False, start_block=2, stage_depth=1),
    dict(selection='stage', keep_ratio=[0.7, 0.4], start_block=1, stage_depth=3, tradeoff=0.1),
])
def test_every_setting_has_the_state_dict_of_the_dense_model(settings):
    dense = timm.create_model('test_vit')
    evolved = timm.create_model('evo_test_vit', **settings)
    evolved.load_state_dict(dense.state_dict(), strict=True)
    assert list(evolved.state_dict()) == list(dense.state_dict())


def test_class_head_alone_adds_keys():
    plain, two_heads = (
        timm.create_model('evo_test_vit', global_pool='avg', class_head=class_head).state_dict()
        for class_head in (False, True)
    )
    assert set(two_heads) - set(plain) == {'norm_cls.weight', 'norm_cls.bias', 'head_cls.weight', 'head_cls.bias'}


@pytest.mark.parametrize('selection', ['stage', 'layer'])
@pytest.mark.parametrize('seed', range(3))
def test_output_of_an_image_does_not_depend_on_the_rest_of_its_batch(selection, seed):
    model = build(seed=seed, selection=selection, start_block=2, stage_depth=2).eval()
    images = torch.randn(5, 3, 24, 24, dtype=torch.float64)
    together = model(images)
    alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    shuffled = model(images.flip(0)).flip(0)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(together, shuffled, rtol=0, atol=1e-10)


@pytest.mark.parametrize('num_traced, num_given', [(1, 4), (4, 1)])
@torch.no_grad()
def test_trace_takes_other_batch_sizes_than_its_own(num_traced, num_given):
    model = build(start_block=2, stage_depth=2).eval()
    traced = torch.jit.trace(model, torch.randn(num_traced, 3, 24, 24, dtype=torch.float64))
    images = torch.randn(num_given, 3, 24, 24, dtype=torch.float64)
    torch.testing.assert_close(traced(images), model(images), rtol=0, atol=1e-10)


@pytest.mark.parametrize('batch_size', [0, 1])
@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('qk_norm', [False, True])
def test_small_batches_work_as_in_the_dense_model(batch_size, training, qk_norm):
    settings = dict(img_size=64, depth=6, qk_norm=qk_norm)
    dense = timm.create_model('deit_tiny_patch16_224', **settings).train(training)
    evolved = timm.create_model('evo_deit_tiny_patch16_224', **settings).train(training)
    images = torch.randn(batch_size, 3, 64, 64)
    assert evolved(images).shape == dense(images).shape == (batch_size, 1000)
    assert evolved.forward_features(images).shape == dense.forward_features(images).shape
    evolved(images).sum().backward()


def test_placeholders_move_by_the_residual_of_the_representative_token():
    model = build(start_block=3, stage_depth=4).eval()
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    maps = [y.flatten(2).transpose(1, 2) for y in model.forward_intermediates(images, intermediates_only=True)]
    moves = maps[-1] - maps[2]  # (B, N, C), over the segment
    for move in moves:
        alike = (move.unsqueeze(0) - move.unsqueeze(1)).abs().amax(-1) < 1e-9  # (N, N)
        assert alike.sum(0).max() == 36 - 18, 'the placeholders, and only they, make the same move'


def test_preserved_placeholders_stay_where_they_are():
    model = build(start_block=3, stage_depth=4, fast_update=False, keep_ratio=0.25).eval()
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    maps = [y.flatten(2) for y in model.forward_intermediates(images, intermediates_only=True)]
    assert ((maps[-1] == maps[2]).all(dim=1).sum(dim=1) == 36 - 9).all()


class LowRank(nn.Module):
    """A low-rank adapter that replaces a projection, and whose weight is only a part of what it computes."""

    def __init__(self, linear: nn.Linear, seed: int) -> None:
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias
        generator = torch.Generator().manual_seed(seed)
        self.down = torch.randn(2, linear.in_features, dtype=torch.float64, generator=generator)
        self.up = torch.randn(linear.out_features, 2, dtype=torch.float64, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize('kind', ['class token', 'no class token', 'qk norm'])
@torch.no_grad()
def test_scores_are_those_of_an_adapted_projection(kind):
    adapted, merged = build(**KINDS[kind]), build(**KINDS[kind])
    for i, (block, merged_block) in enumerate(zip(adapted.blocks, merged.blocks, strict=True)):
        adapter = block.attn.qkv = LowRank(block.attn.qkv, seed=i)
        merged_block.attn.qkv.weight += adapter.up @ adapter.down
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    torch.testing.assert_close(adapted(images), merged(images), rtol=0, atol=1e-9)


def test_scores_that_all_underflow_give_no_nan():
    scores = torch.tensor([[0., 1., 0., 0.]])
    slow = torch.tensor([[0, 1]])
    assert torch.isfinite(published.representative_token(torch.randn(1, 4, 3), scores, slow)).all()


def test_half_precision_scores_are_ranked_in_float32():
    query, keys = torch.randn(1, 2, 4).bfloat16(), torch.randn(1, 2, 50, 4).bfloat16()
    attention = published.class_attention(query, keys, 1.0)
    expected = published.class_attention(query.double(), keys.double(), 1.0)
    torch.testing.assert_close(attention, expected.float())


def test_products_that_overflow_in_half_precision_are_attended_to_as_in_the_dense_model():
    query, keys = torch.full((1, 1, 4), 300.).half(), torch.full((1, 1, 3, 4), 300.).half()  # products of 360000
    torch.testing.assert_close(published.class_attention(query, keys, 0.01), torch.full((1, 3), 1 / 3))


def test_segments_are_block_ranges():
    assert segments(12, 4, 4) == [(4, 7), (8, 11)]
    assert segments(12, 4, 1) == [(i, i) for i in range(4, 12)]
    assert segments(12, 5, 4) == [(5, 8), (9, 11)]


@pytest.mark.parametrize('arguments, read', [
    (dict(), {3, 4, 5, 6, 7}),
    (dict(selection='layer'), {3, 4, 5, 6, 7, 8, 9, 10}),
    (dict(tradeoff=[0.5] * 12), {0, 1, 2, 3, 4, 5, 6, 7}),
    (dict(keep_ratio=[0.5, 1.0]), {3}),
    (dict(keep_ratio=[1.0, 0.5], tradeoff=[1.0] * 12), {7}),
    (dict(keep_ratio=1.0), set()),
])
def test_only_scores_that_a_later_selection_reads_are_computed(arguments, read):
    default = dict(depth=12, keep_ratio=0.5, start_block=4, stage_depth=4, selection='stage', tradeoff=0.5)
    schedule = make_schedule(**(default | arguments))
    assert {i for i, scored in enumerate(schedule.scored) if scored} == read
