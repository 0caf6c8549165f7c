"""What timm promises of a vision transformer holds for the evolved ones. timm's own suite checks much of it besides."""
import copy
import io
import warnings

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

MODELS = ['evo_deit_tiny_patch16_224', 'evo_deit_tiny_distilled_patch16_224']
SMALL = dict(img_size=32, patch_size=4, embed_dim=32, depth=6, num_heads=2, num_classes=7, start_block=2, stage_depth=2)
SIMILARITY = dict(selection='similarity', stage_depth=None)


def create(name: str = MODELS[0], seed: int = 0, **kwargs) -> nn.Module:
    """A small model whose tokens attend to each other unevenly."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **(SMALL | kwargs)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(10)
    return model


def images(batch_size: int = 2, size: int = 32, channels: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch_size, channels, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


# Heads and inputs


def test_reset_classifier(name):
    model = create(name)
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3)
    model.reset_classifier(0)
    assert model(images()).shape == (2, 32)


def test_no_classes_gives_pooled_features(name):
    model = create(name, num_classes=0)
    torch.testing.assert_close(model(images()), model.forward_head(model.forward_features(images()), pre_logits=True))


@pytest.mark.parametrize('global_pool', ['', 'avg', 'avgmax', 'max', 'token', 'map'])
def test_every_global_pool_reads_the_full_sequence(global_pool):
    model = create(global_pool=global_pool)
    features = model.forward_features(images())
    assert features.shape == (2, 1 + 64, 32)
    logits = model(images())
    assert logits.shape == ((2, 65, 7) if global_pool == '' else (2, 7))
    torch.testing.assert_close(logits, model.forward_head(features))


def test_global_pool_can_be_changed_with_the_classifier():
    model = create()
    model.reset_classifier(4, 'avg')
    assert model(images()).shape == (2, 4)
    model.reset_classifier(0, '')
    assert model(images()).shape == (2, 65, 32)


def test_in_chans(name):
    assert create(name, in_chans=1)(images(channels=1)).shape == (2, 7)


def test_an_image_of_the_wrong_size_fails_as_in_timm(name):
    dense = timm.create_model(name.removeprefix('evo_'), img_size=32, patch_size=4)
    messages = []
    for model in (dense, create(name)):
        with pytest.raises(AssertionError) as error:
            model(images(size=36))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_dynamic_img_size_selects_a_share_of_whatever_grid_there_is(name):
    model = create(name, dynamic_img_size=True)
    for size in (32, 24, 44):
        features = model.forward_intermediates(images(size=size), intermediates_only=True)
        assert all(y.shape == (2, 32, size // 4, size // 4) for y in features)
        assert model(images(size=size)).shape == (2, 7)


def test_set_input_size(name):
    model = create(name)
    model.set_input_size(img_size=(40, 24))
    assert model(torch.randn(2, 3, 40, 24)).shape == (2, 7)


def test_class_head_is_reset_and_dropped_with_the_classifier():
    model = create(global_pool='avg', class_head=True)
    model.reset_classifier(3)
    assert [head.out_features for head in model.get_classifier()] == [3, 3]
    assert model(images()).shape == (2, 3)
    assert model.forward_head(model.forward_features(images()), pre_logits=True).shape == (2, 32)
    model.reset_classifier(5, 'token')
    assert model.get_classifier().out_features == 5
    assert not [key for key in model.state_dict() if 'cls' in key and key != 'cls_token']
    assert model(images()).shape == (2, 5)


def test_the_norm_of_the_class_head_stays_with_the_pooling():
    model = create(global_pool='avg', class_head=True)
    nn.init.constant_(model.norm_cls.weight, 3.)
    model.reset_classifier(3)
    assert (model.norm_cls.weight == 3).all()
    model.reset_classifier(3, 'token')
    assert isinstance(model.norm_cls, nn.Identity)


def test_class_head_follows_the_mode_of_distilled_training():
    model = create(global_pool='avg', class_head=True)
    model.set_distilled_training(True)
    assert isinstance(model.train()(images()), tuple)
    assert isinstance(model.eval()(images()), torch.Tensor)


def test_distilled_model_gives_both_logits_in_distilled_training():
    model = create(MODELS[1]).train()
    model.set_distilled_training(True)
    assert [logits.shape for logits in model(images())] == [(2, 7), (2, 7)]


# Features


def test_intermediates_are_whole_ordered_grids_at_every_depth(name):
    """Without drop path, a model that moves no token (its blocks add nothing) must give back its input grid."""
    model = create(name)
    for block in model.blocks:
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.mlp.fc2.weight)
    grid = model._pos_embed(model.patch_embed(images()))[:, model.num_prefix_tokens:]
    grid = grid.transpose(1, 2).reshape(2, 32, 8, 8)
    final, intermediates = model.forward_intermediates(images())
    assert len(intermediates) == 6
    for y in intermediates:
        torch.testing.assert_close(y, grid)
    torch.testing.assert_close(final[:, model.num_prefix_tokens:].transpose(1, 2).reshape(2, 32, 8, 8),
                               model.norm(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize('settings', [dict(), dict(selection='layer'), SIMILARITY])
def test_intermediates_agree_with_the_features(name, settings):
    model = create(name, **settings)
    final, intermediates = model.forward_intermediates(images(), output_fmt='NLC', return_prefix_tokens=True, norm=True)
    patches, prefix = intermediates[-1]
    torch.testing.assert_close(torch.cat([prefix, patches], 1), final)
    torch.testing.assert_close(model.forward_features(images()), final)


def test_intermediates_take_timm_arguments(name):
    model = create(name)
    _, every = model.forward_intermediates(images())
    for indices, wanted in ((2, [4, 5]), ([0, 3], [0, 3]), ([-2], [4])):
        for stop_early in (False, True):
            some = model.forward_intermediates(
                images(), indices=indices, stop_early=stop_early, intermediates_only=True)
            for y, i in zip(some, wanted, strict=True):
                torch.testing.assert_close(y, every[i])
    result = model.forward_intermediates(images(), output_dict=True, return_prefix_tokens=True)
    assert set(result) == {'image_features', 'image_intermediates', 'image_intermediates_prefix'}
    with pytest.raises(ValueError, match='attn_mask'):
        model.forward_intermediates(images(), attn_mask=torch.ones(65, 65))


def test_get_intermediate_layers(name):
    model = create(name)
    layers = model.get_intermediate_layers(images(), n=2, reshape=True)
    expected = model.forward_intermediates(images(), indices=2, intermediates_only=True)
    for a, e in zip(layers, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize('settings', [dict(), SIMILARITY])
@pytest.mark.parametrize('out_indices', [(1, 3), (0,), (2, 5)])
def test_features_only(name, out_indices, settings):
    backbone = create_features(name, out_indices, **settings)
    features = backbone(images())
    assert [f.shape for f in features] == [(2, 32, 8, 8)] * len(out_indices)
    assert len(backbone.model.blocks) == out_indices[-1] + 1

    whole = create(name, **settings)
    whole.load_state_dict(backbone.model.state_dict(), strict=False)
    whole.norm = torch.nn.Identity()  # which the backbone has lost, and which tells similarity what is alike
    expected = whole.forward_intermediates(images(), indices=out_indices, intermediates_only=True)
    for a, e in zip(features, expected, strict=True):
        torch.testing.assert_close(a, e)


def create_features(name, out_indices, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, features_only=True, out_indices=out_indices, **SMALL | kwargs).eval()


def test_pruned_layers_leave_no_scores_that_nothing_reads():
    model = create()  # selections at blocks 2 and 4
    expected = model.forward_intermediates(images(), indices=[3], intermediates_only=True)
    model.prune_intermediate_layers([3])
    assert model.schedule.scored == [False, True, False, False]
    torch.testing.assert_close(model.forward_intermediates(images(), indices=[3], intermediates_only=True), expected)


# Training


def test_group_matcher_orders_all_parameters_by_depth(name):
    groups = group_parameters(create(name), create(name).group_matcher(), reverse=True)
    assert groups['blocks.0.norm1.weight'] < groups['blocks.5.norm1.weight'] < groups['head.weight']
    assert set(groups) == {n for n, _ in create(name).named_parameters()}


@pytest.mark.parametrize('settings', [dict(), dict(selection='layer'), dict(fast_update=False), SIMILARITY])
def test_grad_checkpointing_gives_the_same_gradients(name, settings):
    gradients = []
    for enable in (False, True):
        model = create(name, **settings).train()
        model.set_grad_checkpointing(enable)
        model(images()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize('selection', ['stage', 'layer'])
@pytest.mark.parametrize('settings', [dict(), dict(fast_update=False), dict(global_pool='avg', class_head=True)])
def test_every_parameter_gets_a_gradient(selection, settings):
    model = create(selection=selection, **settings).train()
    model(images()).square().sum().backward()
    assert not [n for n, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize('settings', [dict(), SIMILARITY])
def test_patch_drop_rate_drops_patches_in_training_only(name, settings):
    model, dense = create(name, patch_drop_rate=0.5, **settings), create(name, patch_drop_rate=0.5, keep_ratio=1.0)
    for training in (True, False):
        features, expected = (m.train(training).forward_features(images()) for m in (model, dense))
        assert features.shape == expected.shape
        assert (features.shape[1] < 64) == training
    model.train()(images()).sum().backward()


def test_drop_path_and_dropout_are_random_in_training_only(name):
    model = create(name, drop_path_rate=0.5, drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, pos_drop_rate=0.1)
    model.train()
    assert not torch.equal(model(images()), model(images()))
    model.eval()
    assert torch.equal(model(images()), model(images()))


def test_full_drop_path_leaves_every_token_where_it_was():
    model = create(drop_path_rate=1.0).train()  # the last block always drops, the first never
    model.blocks[-1].drop_path1.scale_by_keep = model.blocks[-1].drop_path2.scale_by_keep = False
    _, intermediates = model.forward_intermediates(images())
    torch.testing.assert_close(intermediates[-1], intermediates[-2])


def test_copies_and_state_dicts_travel(name):
    """As timm's EMA (deep copy) and checkpoints (save and load without pickled code) need it."""
    model = create(name)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    restored = create(name, seed=5)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(model), restored):
        assert torch.equal(other(images()), model(images()))


# Compilers and number formats


def test_torchscript(name):
    model = create(name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # torch.jit.script is deprecated
        scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images()), model(images()))
    torch.testing.assert_close(scripted(images(5)), model(images(5)))


@pytest.mark.parametrize('settings', [dict(), SIMILARITY])
def test_fx_tracing(name, settings):
    model = create(name, **settings)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(images(3)), model(images(3)))


@pytest.mark.parametrize('settings, backend', [
    (dict(), 'aot_eager'),  # tells a graph that breaks or is wrong in a fraction of the time
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        (SIMILARITY, 'aot_eager'), (dict(), 'inductor'), (SIMILARITY, 'inductor')]),
])
def test_compile_is_one_graph_in_training(settings, backend):
    model = create(depth=2, start_block=1, **settings).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    for m in (model, compiled):
        m(images()).square().sum().backward()
    for a, e in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad, rtol=1e-3, atol=1e-4 * max(1, e.grad.abs().max().item()))


@pytest.mark.parametrize('settings, backend', [
    (dict(), 'inductor'),
    (SIMILARITY, 'aot_eager'),
    pytest.param(SIMILARITY, 'inductor', marks=pytest.mark.slow),
])
def test_compile_is_one_graph_in_inference(settings, backend):
    model = create(depth=2, start_block=1, **settings)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('settings', [dict(), SIMILARITY])
def test_export_with_a_dynamic_batch(name, settings):
    model = create(name, depth=3, start_block=1, **settings)
    batch = torch.export.Dim('batch', min=1, max=64)
    exported = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},)).module()
    for batch_size in (1, 2, 5):
        torch.testing.assert_close(exported(images(batch_size)), model(images(batch_size)))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('settings', [dict(), SIMILARITY])
def test_autocast(name, settings, dtype):
    model = create(name, **settings).train()
    with torch.autocast('cpu', dtype=dtype):
        logits = model(images())
        loss = logits.float().square().mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    torch.testing.assert_close(logits.float(), model(images()), rtol=0.1, atol=0.1)


@pytest.mark.parametrize('settings', [dict(), dict(selection='layer'), dict(fast_update=False), SIMILARITY])
def test_pure_bfloat16(name, settings):
    model = create(name, **settings).bfloat16()
    logits = model(images().bfloat16())
    assert logits.dtype == torch.bfloat16
    assert model.forward_features(images().bfloat16()).dtype == torch.bfloat16
    logits.float().sum().backward()
    assert torch.isfinite(logits).all()


def test_created_on_the_meta_device_where_timm_can(name):
    with torch.device('meta'):
        try:
            timm.create_model(name.removeprefix('evo_'))
        except RuntimeError as error:
            pytest.skip(f'timm {timm.__version__} cannot create its dense model there: {error}')
        model = timm.create_model(name)
    assert {p.device.type for p in model.parameters()} == {'meta'}
