"""Kernels against the tensor steps that they take the place of: on a GPU if there is one, else in Triton's interpreter,
which `conftest.py` asks for."""
import pytest
import timm
import torch
from small_vits import create, images
from this_torch import skip_without_kernels
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

import timm_evo
from timm_evo.kernels.choice import can_run, launch
from timm_evo.kernels.size_mask import SizeMask
from timm_evo.method import class_attention, published, similarity
from timm_evo.method.similarity import LayerNorm

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture(autouse=True)
def kernels_wherever_they_can(monkeypatch):
    monkeypatch.setenv('TIMM_EVO_KERNELS', '1')
    skip_without_kernels()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)


class TestAttentionWithSizes:

    def attend(self, query: Tensor, key: Tensor, value: Tensor, sizes: Tensor, **how) -> tuple[Tensor, Tensor]:
        """By a kernel, and by PyTorch in float64."""
        mask = sizes.log().to(query.dtype)[:, None, None]
        out = F.scaled_dot_product_attention(query, key, value, mask.as_subclass(SizeMask), **how)
        assert type(out) is Tensor and out.dtype == query.dtype
        return out, F.scaled_dot_product_attention(
            *(x.double() for x in (query, key, value, mask)), **how).to(out.dtype)

    @pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize('head_dim', [16, 32, 48, 64, 72, 80, 88, 96, 104, 128])
    def test_all_head_sizes_of_timm(self, head_dim, dtype):
        query, key, value = random(3, 2, 2, 37, head_dim, dtype=dtype)
        out, expected = self.attend(query, key, value, random(2, 37, seed=1).exp())
        torch.testing.assert_close(out, expected, **tolerance(dtype))

    @pytest.mark.parametrize('num_tokens', [1, 31, 64, 65, 197, 701])
    def test_all_numbers_of_tokens(self, num_tokens):
        query, key, value = random(3, 1, 2, num_tokens, 32)
        out, expected = self.attend(query, key, value, random(1, num_tokens, seed=1).exp())
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    def test_as_timm_lays_them_out(self):
        query, key, value = random(2, 20, 3, 4, 32).permute(2, 0, 3, 1, 4).unbind(0)
        out, expected = self.attend(query, key, value, random(2, 20, seed=1).exp())
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert out.transpose(1, 2).is_contiguous()  # as the projection behind it reads them

    def test_few_heads_of_keys_and_another_scale(self):
        query, (key, value) = random(2, 6, 20, 32), random(2, 2, 2, 20, 32, seed=1)
        out, expected = self.attend(query, key, value, random(2, 20, seed=2).exp(), enable_gqa=True, scale=0.3)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    def test_large_products_do_not_overflow(self):
        query, key, value = 100 * random(3, 1, 2, 40, 32, dtype=torch.float16)
        out, expected = self.attend(query, key, value, random(1, 40, seed=1).exp())
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)

    def test_a_token_that_counts_two_is_two_tokens(self):
        query, key, value = random(3, 1, 2, 20, 32)
        sizes = torch.ones(1, 20, device=DEVICE)
        sizes[0, 7] = 2
        once, _ = self.attend(query, key, value, sizes)
        twice = [torch.cat([x, x[:, :, 7:8]], dim=2) for x in (query, key, value)]
        out, _ = self.attend(*twice, torch.ones(1, 21, device=DEVICE))
        torch.testing.assert_close(once, out[:, :, :20], rtol=1e-5, atol=1e-5)

    def test_what_a_kernel_cannot_do_is_computed_by_the_tensor_steps(self):
        query, key, value = random(3, 1, 2, 20, 32)
        mask = random(1, 1, 1, 20, seed=1).as_subclass(SizeMask)
        query.requires_grad_()
        F.scaled_dot_product_attention(query, key, value, mask).sum().backward()
        assert query.grad.abs().sum() > 0
        wide = random(3, 1, 1, 20, 160)
        out = F.scaled_dot_product_attention(*wide, mask)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(*wide, mask.as_subclass(Tensor)))

    def test_it_is_a_plain_mask_for_all_else(self):
        mask = random(1, 1, 1, 20).as_subclass(SizeMask)
        assert type(mask + 1) is Tensor and torch.equal(mask + 1, mask.as_subclass(Tensor) + 1)

    def test_autocast_reaches_it(self):
        query, key, value = random(3, 1, 2, 20, 32)
        mask = random(1, 1, 1, 20, seed=1).as_subclass(SizeMask)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert F.scaled_dot_product_attention(query, key, value, mask).dtype == torch.bfloat16


def event(x: Tensor, num_prefix: int, num_gone: int, size=None, present=None, width: int = 0, norm=None, features=None):
    norm = norm or (LayerNorm(None, None, 1e-6))
    return launch(
        'average_alike', x, features, norm.weight, norm.bias, norm.eps, x.dtype, size, present, num_gone, num_prefix,
        width)


def event_by_steps(x, num_prefix, num_gone, size=None, present=None, width=0, norm=None, features=None):
    """Averages, sizes, log sizes, positions in the whole sequence, who follows whom, who goes into whom."""
    norm = norm or (LayerNorm(None, None, 1e-6))
    if features is None:
        features = F.layer_norm(x, x.shape[2:], norm.weight, norm.bias, norm.eps)
    num_patches = x.shape[1] - num_prefix
    # a share that leaves as many; in small grids exactly these
    goes, into = similarity.match_tokens(
        features, size, (num_patches - num_gone + 0.5) / num_patches, num_patches, num_prefix, width or None)
    left, follows = similarity.places_after(goes, into, x.shape[1])
    averages, size = similarity.average_tokens(x, size, goes, into, left)
    goes, order = goes.sort()  # their order has no meaning
    present = left if present is None else present.gather(1, left)
    return averages, size, size.log(), present, follows, goes, into.gather(1, order)


def assert_equal_events(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for x, y in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for x, y in zip(found[3:], expected[3:], strict=True):
        assert torch.equal(x.long(), y)


class TestAnEventOfSimilarity:

    @pytest.mark.parametrize('batch_size', [1, 2])  # one launch, and four
    @pytest.mark.parametrize('height, width, num_prefix', [
        (14, 14, 1), (7, 5, 0), (7, 5, 5), (3, 4, 2), (4, 4, 3), (1, 2, 4)])
    def test_equals_the_steps(self, height, width, num_prefix, batch_size):
        num_patches = height * width
        norm = LayerNorm(random(24, seed=1), random(24, seed=2), 1e-6)
        x = random(batch_size, num_prefix + num_patches, 24, seed=num_patches)
        num_gone = num_patches // 3 if num_patches < 128 else num_patches + num_prefix - 144  # a multiple of 8 stays
        how = dict(width=width, norm=norm)
        first = event(x, num_prefix, num_gone, **how)
        assert_equal_events(first, event_by_steps(x, num_prefix, num_gone, **how))

        averages, size, _, present, *_ = first  # a second event, by sizes and not on a grid
        how = dict(size=size, present=present, norm=norm)
        num_gone = (averages.shape[1] - num_prefix) // 2 // 8 * 8 or 1
        assert_equal_events(
            event(averages, num_prefix, num_gone, **how), event_by_steps(averages, num_prefix, num_gone, **how))

    def test_a_large_grid(self):
        x = random(1, 5 + 37 * 37, 16)
        num_gone = x.shape[1] - 960
        assert_equal_events(event(x, 5, num_gone, width=37), event_by_steps(x, 5, num_gone, width=37))

    @pytest.mark.parametrize('batch_size', [1, 2])
    def test_other_features_and_input_in_pieces(self, batch_size):
        x = random(batch_size, 20, 36)[:, :, ::3]
        features = random(batch_size, 40, 12, seed=1)[:, ::2]
        assert_equal_events(
            event(x, 2, 6, width=6, features=features), event_by_steps(x, 2, 6, width=6, features=features))

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        """Other tokens may be chosen where two are nearly as alike, so what was chosen is checked step by step."""
        x, num_prefix, num_gone = random(2, 1 + 49, 32, dtype=dtype), 1, 14
        averages, size, log_size, left, _, goes, into = event(x, num_prefix, num_gone, width=7)
        assert averages.dtype == log_size.dtype == dtype and size.dtype == torch.float32
        expected, expected_size = similarity.average_tokens(x.float(), None, goes, into, left)
        torch.testing.assert_close(averages.float(), expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(size, expected_size, rtol=2e-2, atol=2e-2)

        features = F.normalize(F.layer_norm(x.float(), (32,)), dim=2)
        lost = 1 - (features.gather(1, goes[:, :, None].expand(-1, -1, 32))
                    * features.gather(1, into[:, :, None].expand(-1, -1, 32))).sum(dim=2)
        best_goes, best_into = similarity.match_tokens(features, None, (49 - 14 + 0.5) / 49, 49, 1, 7)
        least = 1 - (features.gather(1, best_goes[:, :, None].expand(-1, -1, 32))
                     * features.gather(1, best_into[:, :, None].expand(-1, -1, 32))).sum(dim=2)
        torch.testing.assert_close(lost.sum(), least.sum(), rtol=1e-2, atol=0)

    def test_tokens_that_are_no_numbers_do_no_harm(self):
        x = random(2, 1 + 16, 8)
        x[1] = float('nan')
        averages, _, _, left, follows, _, _ = event(x, 1, 5, width=4)
        assert torch.equal(averages[0], event(x[:1].repeat(2, 1, 1), 1, 5, width=4)[0][0])
        assert left.max() <= 16 and follows.max() <= 11 and left.min() >= 0 and follows.min() >= 0

    def test_opposite_tokens_and_tokens_of_zero(self):
        x = random(2, 8, 8)
        x[0, 1:] = 0
        x[1, 1::2] = -x[1, :-1:2]
        assert all(part.isfinite().all() for part in event(x, 0, 4))

    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
    def test_following_restores_all_tokens(self, dtype):
        x = random(2, 3 + 20, 24, dtype=dtype)
        averages, _, _, _, follows, _, _ = event(x, 3, 8, width=5)
        tokens = averages + random(*averages.shape, dtype=dtype, seed=3)
        torch.testing.assert_close(
            launch('follow_averages', x, averages, tokens, follows),
            similarity.follow_averages(x, averages, tokens, follows.long()), **tolerance(dtype))


class TestThePublishedSteps:

    @pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize('num_heads, num_key_heads, head_dim, num_tokens', [
        (3, 3, 64, 197), (4, 2, 32, 20), (1, 1, 80, 257), (6, 6, 16, 600), (2, 2, 72, 1)])
    def test_class_attention(self, num_heads, num_key_heads, head_dim, num_tokens, dtype):
        query = random(2, num_heads, head_dim, dtype=dtype)
        key = random(2, num_tokens, num_key_heads, head_dim, dtype=dtype, seed=1).transpose(1, 2)
        torch.testing.assert_close(
            launch('class_attention', query, key, head_dim ** -0.5, 1, None, False),
            published.class_attention(query, key, head_dim ** -0.5), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize('rotate_half', [False, True])
    @pytest.mark.parametrize('shape', [(20, 64), (3, 20, 64), (2, 1, 20, 64), (2, 3, 20, 64)])
    def test_class_attention_with_rotations(self, shape, rotate_half):
        query, key, rotation = random(2, 3, 32), random(2, 3, 25, 32, seed=1), random(*shape, seed=2)
        torch.testing.assert_close(
            launch('class_attention', query, key, 0.2, 5, rotation, rotate_half),
            published.class_attention(query, key, 0.2, 5, rotation, rotate_half), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize('num_prefix', [0, 1, 5])
    @pytest.mark.parametrize('num_patches', [1, 35, 196])
    @pytest.mark.parametrize('fast_update', [False, True])
    def test_selection_and_following(self, num_patches, num_prefix, fast_update):
        x = random(2, num_prefix + num_patches, 24)
        scores = random(2, num_prefix + num_patches, seed=1).sigmoid()
        num_slow = max(1, num_patches // 2)
        present, place, weight, present_scores = launch('select_tokens', scores, num_slow, num_prefix)
        slow = published.select_tokens(scores, num_slow / num_patches, num_prefix)
        assert torch.equal(present, slow.sort()[0])
        assert torch.equal(present_scores, scores.gather(1, present))

        entered = launch('gather_with_representative', x, present, weight, fast_update)
        representative = published.representative_token(x, scores, present) if fast_update else None
        tokens = x.gather(1, present[:, :, None].expand(-1, -1, 24))
        expected = tokens if representative is None else torch.cat([tokens, representative], dim=1)
        torch.testing.assert_close(entered, expected, rtol=1e-5, atol=1e-5)

        left = entered + random(*entered.shape, seed=2)
        torch.testing.assert_close(
            launch('follow', x, left, place, entered, present.shape[1]),
            published.follow(x, left, present, entered[:, -1:] if fast_update else None), rtol=1e-5, atol=1e-5)

    def test_equal_scores_and_scores_that_are_no_numbers(self):
        scores = torch.zeros(2, 10, device=DEVICE)
        scores[1] = float('nan')
        present, *_ = launch('select_tokens', scores, 4, 1)
        assert torch.equal(present, torch.arange(5, device=DEVICE).expand(2, 5))

    @pytest.mark.parametrize('representative', [False, True])
    @pytest.mark.parametrize('shape', [(20, 8), (3, 20, 8), (2, 1, 20, 8), (2, 3, 20, 8)])
    def test_rotations(self, shape, representative):
        rotation = random(*shape)
        positions = torch.tensor([[0, 1, 4, 9, 21], [0, 1, 2, 3, 15]], device=DEVICE)
        assert torch.equal(
            launch('gather_rotations', rotation, positions, 2, representative),
            class_attention.gather_rotations(rotation, positions, 2, representative))


KINDS = {
    'class token': ('evo_deit_tiny_patch16_224', {}),
    'registers': ('evo_vit_small_patch14_reg4_dinov2', {}),
    'mean of all tokens': ('evo_vit_base_patch16_siglip_gap_224', {}),
    'qk norm': ('evo_vit_tiny_patch16_224', dict(qk_norm=True)),
    'EVA-02': ('evo_eva02_tiny_patch14_224', {}),
    'DINOv3': ('evo_vit_small_patch16_dinov3', {}),
    'mixed rotations': ('evo_vit_small_patch16_rope_mixed_224', {}),
    'parallel branches': ('evo_vit_small_patch16_36x1_224', {}),
}


def with_and_without(model: nn.Module, x: Tensor, monkeypatch) -> tuple[Tensor, Tensor]:
    """Tokens by kernels, and by the tensor steps."""
    with torch.no_grad():
        found = model.forward_features(x)
        monkeypatch.setenv('TIMM_EVO_KERNELS', '0')
        expected = model.forward_features(x)
    monkeypatch.setenv('TIMM_EVO_KERNELS', '1')
    return found, expected


@pytest.mark.parametrize('selection', ['similarity', 'stage'])
@pytest.mark.parametrize('kind', KINDS)
def test_whole_models(kind, selection, monkeypatch):
    name, settings = KINDS[kind]
    model = create(name, **settings, selection=selection, keep_ratio=0.6).to(DEVICE)
    x = images(model).to(DEVICE)
    found, expected = with_and_without(model, x, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        by_kernels = timm_evo.trace(model, x), model(x)
        monkeypatch.setenv('TIMM_EVO_KERNELS', '0')
        by_steps = timm_evo.trace(model, x), model(x)
    torch.testing.assert_close(by_kernels[1], by_steps[1], rtol=1e-4, atol=1e-4)
    for one, other in zip(by_kernels[0], by_steps[0], strict=True):
        assert torch.equal(one.slow, other.slow) and torch.equal(one.follows, other.follows)


@pytest.mark.parametrize('settings', [
    dict(selection='layer'), dict(selection='stage', fast_update=False), dict(selection='similarity', keep_ratio=0.5)])
def test_settings(settings, monkeypatch):
    model = create('evo_deit_tiny_patch16_224', **settings).to(DEVICE)
    found, expected = with_and_without(model, images(model).to(DEVICE), monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('selection', ['similarity', 'stage'])
@torch.no_grad()
def test_no_result_depends_on_what_shares_its_batch(selection):
    model = create('evo_deit_tiny_patch16_224', selection=selection).to(DEVICE)
    x = images(model, batch_size=3).to(DEVICE)
    together = model.forward_features(x)
    assert torch.equal(together, model.forward_features(x))  # the same bits twice
    torch.testing.assert_close(together[:2], model.forward_features(x[:2]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[:1], model.forward_features(x[:1]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_without_the_fused_attention_the_mask_is_plain(monkeypatch):
    set_fused_attn(False)
    try:
        model = create('evo_deit_tiny_patch16_224').to(DEVICE)
    finally:
        set_fused_attn(True)
    found, expected = with_and_without(model, images(model).to(DEVICE), monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class TestWhereTheStepsRun:
    """Kernels are replaced by the tensor steps wherever they cannot run."""

    def test_gradients(self):
        x = random(1, 4, 8).requires_grad_()
        assert not can_run(x)
        with torch.no_grad():
            assert can_run(x)

    def test_other_numbers(self):
        assert not can_run(random(1, 4, 8).double())

    def test_if_the_environment_turns_kernels_off(self, monkeypatch):
        monkeypatch.setenv('TIMM_EVO_KERNELS', '0')
        assert not can_run(random(1, 4, 8))
        monkeypatch.delenv('TIMM_EVO_KERNELS')
        assert can_run(random(1, 4, 8)) == (DEVICE == 'cuda')

    def test_transforms(self):
        seen = []
        torch.func.vmap(lambda x: seen.append(can_run(x)) or x)(random(2, 4))
        torch.func.jvp(lambda x: seen.append(can_run(x)) or x, (random(2, 4),), (random(2, 4),))
        with torch.autograd.forward_ad.dual_level():
            seen.append(can_run(random(2, 4)))
        assert seen == [False] * 3

    @pytest.mark.parametrize('name', ['evo_deit_tiny_patch16_224', 'evo_vit_small_patch16_dinov3'])
    @pytest.mark.parametrize('selection', ['similarity', 'stage'])
    @pytest.mark.parametrize('is_beginning_frozen', [False, True])
    def test_gradients_of_a_model(self, name, selection, is_beginning_frozen, monkeypatch):
        """By similarity, kernels choose, which has none. Before the first block that is trained, they do all."""
        model = create(name, selection=selection).to(DEVICE).train()
        if is_beginning_frozen:
            model.requires_grad_(False)
            for parameter in [*model.norm.parameters(), *model.blocks[3].parameters()]:
                parameter.requires_grad_()
        x = images(model).to(DEVICE)
        results = []
        for setting in ('1', '0'):
            monkeypatch.setenv('TIMM_EVO_KERNELS', setting)
            model.zero_grad()
            out = model.forward_features(x)
            out.square().mean().backward()
            results.append([out, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    def test_models_are_trained_traced_and_exported_as_before(self):
        model = create('evo_deit_tiny_patch16_224', depth=3).to(DEVICE)
        x = images(model).to(DEVICE)
        model(x).sum().backward()
        assert model.blocks[0].attn.qkv.weight.grad.isfinite().all()
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), expected, rtol=1e-4, atol=1e-4)
            program = torch.export.export(model, (x,))
        assert not [node for node in program.graph.nodes if 'timm_evo' in str(node.target)]
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)


def test_an_error_says_how_to_run_without_kernels():
    with pytest.raises(RuntimeError, match='TIMM_EVO_KERNELS=0'):
        launch('follow_averages', random(1, 4, 8), random(1, 2), random(1, 2, 8), random(1, 4))


def test_tokens_are_a_multiple_of_eight():
    model = timm.create_model('evo_deit_tiny_patch16_224', selection='similarity', keep_ratio=0.6)
    numbers = [selection.slow.flatten(1).sum(dim=1) + 1 for selection in timm_evo.trace(
        model, torch.randn(2, 3, 224, 224))]
    assert numbers and all((number % 8 == 0).all() for number in numbers)


def test_a_selector_takes_any_likeness():
    """One that is no LayerNorm computes features itself."""
    model = create('evo_vit_tiny_patch16_224', norm_layer='rmsnorm').to(DEVICE)
    assert model(images(model).to(DEVICE)).isfinite().all()
