"""timm's `Eva` with token evolution: what it computes, against an obvious implementation, and what follows from it."""
import copy
import random

import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from slow_evolution import assert_equal_after_every_block, assert_equal_gradients, evolve_slowly
from slow_similarity import average_slowly
from test_method import SMALL, random_settings, slow_arguments
from this_torch import ANY_SIZE
from timm.layers import RmsNorm
from timm.models.eva import Eva
from torch import nn

import timm_evo
from timm_evo import EvoEva
from timm_evo.models import short_block

# What makes up the models that timm has: EVA and EVA-02 with their CLIP towers, DINOv3, Sapiens 2, ROPE-ViT, Perception
# Encoder and the ViTs of timm itself.
ROPE = dict(use_rot_pos_emb=True)
DINOV3 = dict(
    use_rot_pos_emb=True, rope_type='dinov3', rope_rotate_half=True, use_abs_pos_emb=False, no_embed_class=True)
KINDS = {
    'eva': dict(),
    'eva, norms behind': dict(use_post_norm=True, global_pool='token'),
    'eva02': dict(**ROPE, swiglu_mlp=True, scale_mlp=True, ref_feat_shape=4),
    'eva02, split': dict(**ROPE, qkv_fused=False, swiglu_mlp=True, scale_attn_inner=True, global_pool='token'),
    'dinov3': dict(**DINOV3, num_reg_tokens=4, init_values=0.5, qkv_bias=False, dynamic_img_size=True),
    'rope': dict(**ROPE, attn_type='rope', use_abs_pos_emb=False, init_values=0.5, global_pool='token'),
    'mixed rope': dict(
        **ROPE, rope_type='mixed', rope_temperature=10., attn_type='rope', use_abs_pos_emb=False, global_pool='token'),
    'perception encoder': dict(
        **ROPE, attn_type='rope', use_pre_transformer_norm=True, global_pool='map', rope_grid_offset=1.,
        rope_grid_indexing='xy'),
    'no class token': dict(**ROPE, class_token=False),
    'registers only': dict(**ROPE, class_token=False, num_reg_tokens=2, no_embed_class=True),
}
if 'num_kv_heads' in Eva.__init__.__code__.co_varnames:  # of a newer timm
    KINDS |= {
        'sapiens2': dict(
            **DINOV3, num_reg_tokens=2, attn_type='rope', qkv_fused=False, num_kv_heads=1, qk_norm=True,
            norm_layer=RmsNorm, attn_only_layer_scale=True, init_values=0.5, global_pool='token'),
        'multimodal rope': dict(**ROPE, rope_type='mrope', rope_mrope_section=(1, 1, 2), attn_type='rope'),
    }


def build(seed: int = 0, selection: str = 'stage', dtype: torch.dtype = torch.float64, **kwargs) -> EvoEva:
    """A small model, with weights far enough from zero for attention to differ between tokens."""
    torch.manual_seed(seed)
    model = EvoEva(**(SMALL | kwargs), selection=selection)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return in_precision(model, dtype)


def in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    model = model.to(dtype).eval()
    if model.rope_mixed:
        model.rope.float()  # an older timm computes these rotations in nothing else
    return model


def similarity_settings(seed: int) -> dict:
    rng = random.Random(seed)
    return dict(selection='similarity', start_block=rng.choice([None, 1, 2]), keep_ratio=rng.uniform(0.5, 1))


def choose_settings(selection: str, seed: int) -> dict:
    if selection == 'similarity':
        return similarity_settings(seed)
    return random_settings(seed) | dict(selection=selection, keep_ratio=0.4)


def run_slowly(model: EvoEva, images: torch.Tensor, settings: dict) -> list[torch.Tensor]:
    if settings['selection'] == 'similarity':
        return average_slowly(model, images, model.schedule.keep_ratio)
    return evolve_slowly(model, images, **slow_arguments(settings))


def check_equal(model: EvoEva, images: torch.Tensor, settings: dict) -> None:
    expected = run_slowly(model, images, settings)
    assert_equal_after_every_block(model, images, expected, str(settings))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('seed', range(3))
@torch.no_grad()
def test_published_equals_the_obvious_implementation(kind, seed):
    settings = random_settings(100 * seed + list(KINDS).index(kind))
    model = build(seed, **KINDS[kind], **settings)
    check_equal(model, torch.randn(2, 3, 24, 24, dtype=torch.float64), settings)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('seed', range(2))
@torch.no_grad()
def test_similarity_equals_the_obvious_implementation(kind, seed):
    settings = similarity_settings(100 * seed + list(KINDS).index(kind))
    model = build(seed, **KINDS[kind], **settings)
    check_equal(model, torch.randn(2, 3, 24, 24, dtype=torch.float64), settings)


@pytest.mark.parametrize('selection', ['stage', 'similarity'])
@pytest.mark.parametrize('kind', ['eva02', 'mixed rope', 'dinov3', 'registers only'])
@pytest.mark.parametrize('size', [(24, 32), (20, 28)])
@torch.no_grad()
def test_images_of_another_size_than_trained_and_not_square(kind, selection, size):
    settings = choose_settings(selection, seed=3)
    fixed = build(**KINDS[kind] | dict(dynamic_img_size=False), **settings)
    fixed.set_input_size(img_size=size)
    dynamic = build(**KINDS[kind] | dict(dynamic_img_size=True), **settings)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    for model in (fixed, dynamic):
        check_equal(model, images, settings)


@pytest.mark.parametrize('selection', ['layer', 'similarity'])
@pytest.mark.parametrize('kind', ['eva', 'eva02', 'mixed rope'])
@torch.no_grad()
def test_patches_that_are_dropped_in_training_take_their_rotations_along(kind, selection):
    settings = choose_settings(selection, seed=5)
    model = build(**KINDS[kind], patch_drop_rate=0.4, **settings).train()
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    torch.manual_seed(1)
    expected = run_slowly(model, images, settings)[-1]
    torch.manual_seed(1)
    actual = model.forward_features(images)
    assert actual.shape[1] == model.num_prefix_tokens + 21  # of 36 patches
    torch.testing.assert_close(actual, model.norm(expected), rtol=0, atol=1e-9)


@pytest.mark.skipif('sapiens2' not in KINDS, reason='an older timm has no gates')
@pytest.mark.parametrize('selection', ['layer', 'similarity'])
@torch.no_grad()
def test_gates_of_attention_are_as_they_are(selection):
    settings = choose_settings(selection, seed=7)
    model = build(**KINDS['rope'], **settings)
    for block in model.blocks:
        block.attn.gate = nn.Linear(24, 24).double()
    check_equal(model, torch.randn(2, 3, 24, 24, dtype=torch.float64), settings)


@pytest.mark.skipif('sapiens2' not in KINDS, reason='an older timm has it for no model')
def test_rotations_are_augmented_in_training_only():
    model = build(**KINDS['eva02'], rope_jitter_coords=2., selection='similarity')
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.allclose(model(images), model(images))


@pytest.mark.parametrize('selection', ['stage', 'similarity'])
@pytest.mark.parametrize('kind', ['eva02, split', 'dinov3', 'mixed rope', 'registers only'])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_gradients_equal_the_obvious_implementation(kind, selection, checkpointing):
    settings = dict(selection=selection, keep_ratio=0.6)
    model = build(**KINDS[kind], **settings)
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    settings |= dict(start_block=2, stage_depth=3, tradeoff=0.5, fast_update=True)  # the defaults, worked out
    expected = model.forward_head(model.norm(run_slowly(model, images, settings)[-1]))
    assert_equal_gradients(model, model(images), expected, {'rope.freqs': 1e-5})  # timm computes these in float32


@pytest.mark.parametrize('kind', KINDS)
def test_keep_ratio_one_is_the_dense_model(kind):
    evolved = build(**KINDS[kind], dtype=torch.float32)
    dense = timm_evo.restore(copy.deepcopy(evolved))
    assert type(dense) is Eva and not hasattr(dense, 'has_class_token')
    images = torch.randn(2, 3, 24, 24)
    for selection in ('stage', 'similarity'):
        evolved.set_evolution(selection=selection, keep_ratio=1.0)
        for model in (dense, evolved):
            model.zero_grad()
            model(images).square().mean().backward()
        torch.testing.assert_close(evolved(images), dense(images), rtol=0, atol=1e-5)
        for a, e in zip(evolved.parameters(), dense.parameters(), strict=True):
            if e.grad is not None:
                torch.testing.assert_close(a.grad, e.grad, rtol=0, atol=1e-5 * max(1, e.grad.abs().max().item()))


@pytest.mark.parametrize('selection', ['stage', 'layer', 'similarity'])
@pytest.mark.parametrize('kind', ['eva02', 'dinov3', 'mixed rope', 'perception encoder', 'no class token'])
def test_output_of_an_image_does_not_depend_on_the_rest_of_its_batch(kind, selection):
    model = build(**KINDS[kind], selection=selection)
    images = torch.randn(4, 3, 24, 24, dtype=torch.float64)
    together = model(images)
    alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
    try:
        timm_evo.restore(copy.deepcopy(model))(images[:0])
    except RuntimeError:  # not all of timm's attentions take an empty batch
        return
    assert model(images[:0]).shape == (0, 5)


@pytest.mark.parametrize('kind, selection', [
    ('eva, norms behind', 'stage'), ('eva02, split', 'stage'), ('dinov3', 'similarity'), ('mixed rope', 'stage')])
def test_torchscript_gives_the_same(kind, selection):
    model = build(**KINDS[kind], depth=4, selection=selection)
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(model)(images), model(images), rtol=0, atol=1e-9)
    traced = torch.jit.trace(model, images)
    torch.testing.assert_close(traced(images[:1]), model(images[:1]), rtol=0, atol=1e-9)


@pytest.mark.parametrize('kind, selection', [
    ('dinov3', 'similarity'), ('mixed rope', 'layer'), pytest.param('eva02', 'stage', marks=pytest.mark.slow),
    pytest.param('registers only', 'stage', marks=pytest.mark.slow)])
def test_a_compiled_model_is_one_graph(kind, selection):
    model = build(**KINDS[kind], depth=4, selection=selection)
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-9)


@pytest.mark.parametrize('kind, selection', [
    ('dinov3', 'similarity'), *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ('mixed rope', 'stage'), ('eva02, split', 'stage'), ('perception encoder', 'similarity')])])
def test_an_export_gives_the_logits_at_any_batch_size(kind, selection, tmp_path):
    kwargs = KINDS[kind] | dict(dynamic_img_size=False)
    model = build(**kwargs, depth=4, selection=selection, dtype=torch.float32)
    images = torch.randn(8, 3, 24, 24)
    exported = torch.export.export(model, (images[:2],), dynamic_shapes=({0: ANY_SIZE},))
    torch.onnx.export(exported, f=tmp_path / 'model.onnx', dynamo=True, verbose=False, input_names=['images'])
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    for batch in (images[:1], images):
        expected = model(batch).detach()
        torch.testing.assert_close(exported.module()(batch), expected, rtol=0, atol=1e-4)
        logits = session.run(None, {'images': batch.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('kind', [kind for kind in KINDS if KINDS[kind].get('global_pool') == 'token'])
def test_the_last_block_is_short_if_the_head_reads_the_class_token_and_there_are_no_hooks(kind, monkeypatch):
    """That the logits are those of the whole block is part of the equality with the obvious implementation."""
    model = build(**KINDS[kind], selection='similarity')
    images, calls = torch.randn(2, 3, 24, 24, dtype=torch.float64), []
    forward_first = short_block.forward_first
    monkeypatch.setattr(short_block, 'forward_first', lambda *args: calls.append(args) or forward_first(*args))
    logits = model(images)
    is_short = kind != 'eva, norms behind'  # no part of such a block is known
    assert len(calls) == is_short
    seen = []
    model.blocks[-1].attn.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-9)
    assert len(calls) == is_short and seen[0] > model.num_prefix_tokens


@pytest.mark.parametrize('kind', ['eva02', 'dinov3', 'mixed rope', 'no class token'])
def test_trace_tells_what_the_obvious_implementation_selects(kind):
    settings = dict(selection='stage', keep_ratio=0.4, start_block=2, stage_depth=3, tradeoff=0.5, fast_update=True)
    model = build(**KINDS[kind], **settings)
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    wanted: list = []
    evolve_slowly(model, images, **slow_arguments(settings), selected=wanted)
    for number, selection in enumerate(timm_evo.trace(model, images)):
        for image, of_image in enumerate(wanted):
            block, slow, scores = of_image[number]
            assert selection.block == block
            assert set(selection.slow[image].flatten().nonzero().flatten().tolist()) == slow
            torch.testing.assert_close(selection.scores[image].flatten(), torch.stack(scores), rtol=0, atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', ['eva02', 'dinov3', 'mixed rope'])
@pytest.mark.parametrize('selection', ['stage', 'similarity'])
def test_half_precision_stays_near(kind, dtype, selection):
    kwargs = KINDS[kind] | dict(img_size=48, embed_dim=48)
    torch.manual_seed(0)
    model = EvoEva(**SMALL | kwargs, selection=selection).eval()
    images = torch.randn(4, 3, 48, 48)
    expected = model.forward_features(images).mean(1)
    with torch.autocast('cpu', dtype):
        autocast = model.forward_features(images).mean(1)
    for features in (autocast, in_precision(model, dtype).forward_features(images.to(dtype)).mean(1)):
        assert F.cosine_similarity(features.float(), expected).min() > 0.97


def test_a_second_head_on_the_class_token():
    model = build(**KINDS['eva02'], class_head=True)
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    model.set_distilled_training()
    pooled, of_class = model.train()(images)
    torch.testing.assert_close(model.eval()(images), (pooled + of_class) / 2)
    assert len(model.get_classifier()) == 2
    with pytest.raises(ValueError, match='class_head=True is not allowed .* needs global_pool=.avg. and a class'):
        build(**KINDS['rope'], class_head=True)


class OwnHead(Eva):
    def forward_head(self, x, pre_logits=False):
        return self.head(x.mean(dim=1))  # reads all tokens, whatever global_pool says


class OwnForward(Eva):
    def forward_features(self, x):
        return 2 * super().forward_features(x)


def test_subclasses_keep_what_they_change():
    dense = OwnHead(**SMALL, **KINDS['rope']).eval()
    images = torch.randn(2, 3, 24, 24)
    expected = dense(images)
    evolved = timm_evo.evolve(dense, keep_ratio=1.0)
    assert isinstance(evolved, OwnHead) and type(evolved).__name__ == 'EvoOwnHead'
    torch.testing.assert_close(evolved(images), expected)
    evolved.set_evolution(keep_ratio=0.5)
    torch.testing.assert_close(evolved(images), evolved.forward_head(evolved.forward_features(images)))
    with pytest.raises(TypeError, match="OwnForward cannot be evolved, because it overrides .*_features of timm's Eva"):
        timm_evo.evolve(OwnForward(**SMALL))


def test_a_module_with_another_attention_is_refused():
    model = Eva(**SMALL)
    model.blocks[3].attn = nn.MultiheadAttention(24, 3)
    with pytest.raises(TypeError, match='EvaBlock with MultiheadAttention cannot be evolved'):
        timm_evo.evolve(model)
    assert type(model) is Eva


def test_the_registered_models_of_the_module_are_all_that_timm_has():
    for name in timm.list_models(module='eva'):
        assert f'evo_{name}' in timm.list_models('evo_*'), name
