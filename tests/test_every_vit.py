"""Any ViT of timm's evolves: registered twins, instances by `evolve`, and what is refused."""
import copy
import pickle

import numpy as np
import pytest
import timm
import torch
import torch._dynamo.testing
from small_vits import create, images
from this_torch import load_folder
from timm.models import VisionTransformer, get_arch_pretrained_cfgs
from timm.models._hub import save_for_hf
from torch import nn

import timm_evo
from timm_evo import EvoVisionTransformer, evolve, hub, restore
from timm_evo.method.schedule import make_schedule, segments

# One name of each family, see `small_vits`.
FAMILIES = [
    'vit_tiny_patch16_224', 'vit_base_patch32_224', 'vit_large_patch16_384', 'vit_huge_patch14_224',
    'vit_base_patch8_224', 'vit_small_patch16_36x1_224', 'deit_small_patch16_224', 'deit_base_distilled_patch16_224',
    'deit3_small_patch16_224', 'deit3_large_patch16_384', 'vit_base_patch16_clip_224', 'vit_large_patch14_clip_336',
    'vit_base_patch32_clip_quickgelu_224', 'vit_small_patch14_dinov2', 'vit_small_patch14_reg4_dinov2',
    'vit_medium_patch16_gap_256', 'vit_base_patch16_reg4_gap_256', 'vit_base_patch16_siglip_224',
    'vit_so400m_patch14_siglip_gap_224', 'vit_so150m_patch16_reg4_map_256', 'vit_base_patch16_radio_v3',
    'vit_base_patch14_reg1_tipsv2', 'flexivit_small', 'eva_large_patch14_196', 'aimv2_large_patch14_224',
    'beit3_base_patch16_224', 'vit_tiny_r_s16_p8_224', 'test_vit3', 'vit_small_patch16_18x2_224',
    'vit_base_patch16_xp_224', 'vit_pwee_patch16_reg1_gap_256', 'vit_base_patch16_rpn_224',
    # timm's `Eva`
    'eva_giant_patch14_224', 'eva02_tiny_patch14_224', 'eva02_base_patch16_clip_224', 'eva02_enormous_patch14_clip_224',
    'vit_small_patch16_dinov3', 'vit_small_plus_patch16_dinov3_qkvb', 'vit_base_patch16_sapiens2',
    'vit_small_patch16_lingbot', 'vit_small_patch16_rope_224', 'vit_small_patch16_rope_ape_224',
    'vit_small_patch16_rope_mixed_224', 'vit_small_patch16_rope_mixed_ape_224', 'vit_medium_patch16_rope_reg1_gap_256',
    'vit_pe_core_tiny_patch16_384', 'vit_pe_core_gigantic_patch14_448', 'vit_pe_spatial_tiny_patch16_512',
]
REGISTERED = [
    name for name in timm.list_models('evo_*')
    if name != 'evo_deit_small_patch16_384' and not name.startswith('evo_levit_cls')  # they have no dense twin
]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.)


@pytest.fixture(params=FAMILIES)
def dense(request):
    if request.param not in timm.list_models():
        pytest.skip(f'timm {timm.__version__} has no {request.param}')
    return create(request.param)


# Registered twins


def test_twins_are_built_as_timm_builds_the_dense_models(monkeypatch):
    """Filters of checkpoints, strictness of loading and features, which timm chooses by names."""
    class Built(Exception):
        pass

    def build(*args, pretrained_filter_fn=None, pretrained_strict=True, feature_cfg=None, **kwargs):
        function = getattr(pretrained_filter_fn, 'func', pretrained_filter_fn)
        raise Built(function, getattr(pretrained_filter_fn, 'keywords', {}), pretrained_strict, feature_cfg)

    names = 'vision_transformer', 'vision_transformer_hybrid', 'deit', 'levit', 'eva'
    modules = [f'timm.models.{name}' for name in names]
    for module in [*modules, 'timm_evo.models.registry']:
        monkeypatch.setattr(f'{module}.build_model_with_cfg', build)
    for name in REGISTERED:
        if 'levit' in name:
            continue  # timm leaves the features of LeViT to its own arguments
        how = []
        for model in (name, name.removeprefix('evo_')):
            with pytest.raises(Built) as built:
                timm.create_model(model)
            how.append(built.value.args)
        assert how[0] == how[1], name


def test_all_families_are_registered():
    names = set(REGISTERED)
    for family in (
        'vit_{}_patch16_224', 'vit_{}_patch16_384', 'deit3_{}_patch16_224', 'vit_{}_patch16_clip_224',
        'vit_{}_patch14_clip_224', 'vit_{}_patch14_dinov2', 'vit_{}_patch14_reg4_dinov2', 'vit_{}_patch16_siglip_256',
        'vit_{}_patch16_siglip_gap_256', 'flexivit_{}', 'vit_{}_r26_s32_224', 'eva02_{}_patch14_224',
        'vit_{}_patch16_dinov3', 'vit_{}_patch16_rope_224', 'vit_{}_patch16_rope_mixed_224',
    ):
        sizes = [size for size in ('tiny', 'small', 'base', 'large', 'huge', 'giant')
                 if family.format(size) in timm.list_models()]
        assert sizes and {f'evo_{family.format(size)}' for size in sizes} <= names


@pytest.mark.parametrize('name', REGISTERED)
def test_a_registered_twin_has_the_keys_and_weights_of_the_dense_model(name, monkeypatch):
    # on the meta device there are no values to draw, and that takes most of the time there
    monkeypatch.setattr('timm.layers.weight_init._trunc_normal_', lambda tensor, *args: tensor)
    dense_name = name.removeprefix('evo_')
    try:
        with torch.device('meta'):
            dense = timm.create_model(dense_name)
    except RuntimeError as error:
        pytest.skip(f'timm {timm.__version__} cannot create its dense model on the meta device: {error}')
    with torch.device('meta'):
        model = timm.create_model(name)
    assert model.state_dict().keys() == dense.state_dict().keys()

    def weights(name: str, prefix: str) -> dict:
        cfgs = get_arch_pretrained_cfgs(name)
        return {key.removeprefix(prefix): (cfg.hf_hub_id, cfg.url, cfg.file) for key, cfg in cfgs.items()}

    assert weights(name, 'evo_') == weights(dense_name, '')


def test_thirds_of_other_depths():
    for depth, expected in {
        2: [(1, 1)], 6: [(2, 3), (4, 5)], 12: [(4, 7), (8, 11)], 24: [(8, 15), (16, 23)],
        27: [(9, 17), (18, 26)], 32: [(11, 21), (22, 31)], 40: [(13, 26), (27, 39)],
    }.items():
        schedule = make_schedule(depth, 0.5, None, None, 'stage', 0.5)
        firsts = [i for i, begins in enumerate(schedule.begins) if begins]
        assert firsts == [first for first, _ in expected]
        assert segments(depth, expected[0][0], expected[0][1] - expected[0][0] + 1) == expected


# Instances


def test_evolve_and_restore_leave_the_dense_model_as_it_was(dense):
    x = images(dense)
    logits, keys, attributes, dense_cls = dense(x), dense.state_dict().keys(), set(vars(dense)), type(dense)
    weights = [parameter.data_ptr() for parameter in dense.parameters()]

    evolved = evolve(dense)
    assert evolved is dense and evolved.state_dict().keys() == keys
    assert not torch.allclose(evolved(x), logits, atol=1e-4)
    restored = restore(evolved)
    assert restored is dense and type(restored) is dense_cls and set(vars(restored)) == attributes
    assert [parameter.data_ptr() for parameter in restored.parameters()] == weights
    assert torch.equal(restored(x), logits)


def test_keep_ratio_one_is_the_dense_model(dense):
    x = images(dense)
    evolved = evolve(copy.deepcopy(dense), keep_ratio=1.0)
    for model in (dense, evolved):
        model.zero_grad()
        model(x).square().mean().backward()
    torch.testing.assert_close(evolved(x), dense(x), rtol=1e-5, atol=1e-5)
    for a, e in zip(evolved.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad, rtol=1e-4, atol=1e-5 * max(1, e.grad.abs().max().item()))


def test_every_parameter_that_trains_in_the_dense_model_trains(dense):
    gradients = []
    for model in (copy.deepcopy(dense), evolve(dense)):
        model.train()(images(model)).square().mean().backward()
        gradients.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert gradients[0] == gradients[1]


def test_features_are_whole_grids(dense):
    features = evolve(dense).forward_intermediates(images(dense), intermediates_only=True)
    assert [y.shape for y in features] == [(2, 48, 6, 6)] * 6


def test_a_created_model_is_restored_to_the_dense_twin():
    model = timm.create_model('evo_test_vit').eval()
    dense = timm.create_model('test_vit').eval()
    dense.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 160, 160)
    assert torch.equal(restore(model)(x), dense(x))
    assert type(model) is VisionTransformer


def test_restoring_takes_class_head_and_count_away():
    dense = create('vit_tiny_patch16_224', global_pool='avg')
    keys = dense.state_dict().keys()
    model = evolve(dense, selection='stage', class_head=True, layerwise_updates=5)
    assert {'head_cls.weight', 'num_updates'} <= model.state_dict().keys() - keys
    assert restore(model).state_dict().keys() == keys
    sgd(model).step()  # no model counts any more


def test_a_refused_model_is_left_as_it_was():
    dense = create('vit_tiny_patch16_224')
    keys, attributes = dense.state_dict().keys(), set(vars(dense))
    for _ in range(2):
        with pytest.raises(ValueError, match='class_head=True is not allowed'):
            evolve(dense, selection='stage', layerwise_updates=3, class_head=True)
        assert type(dense) is VisionTransformer
        assert dense.state_dict().keys() == keys and set(vars(dense)) == attributes
        sgd(dense).step()


@pytest.mark.parametrize('device, dtype', [('cpu', torch.float64), ('meta', torch.float32)])
def test_device_and_dtype_stay(device, dtype):
    model = evolve(create('vit_tiny_patch16_224').to(device, dtype), selection='stage', layerwise_updates=5)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, dtype)}
    assert model.num_updates.device.type == device


def test_weights_may_be_loaded_less_strictly_as_in_timm():
    weights = timm.create_model('test_vit').state_dict()
    weights.pop('head.bias')
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights))
    timm.create_model('evo_test_vit', pretrained_strict=False, **overlay)
    with pytest.raises(RuntimeError, match='head.bias'):
        timm.create_model('evo_test_vit', **overlay)


def test_the_input_size_of_a_hybrid_is_that_of_its_image():
    model = evolve(create('vit_tiny_r_s16_p8_224'), selection='stage', keep_ratio=0.2)  # a patch is 32 pixels wide
    with pytest.raises(ValueError, match='keep_ratio=0.2 of 4 patch tokens'):
        model.set_input_size(img_size=64)
    model.set_input_size(img_size=96)
    assert model(images(model)).shape == (2, 5)


# Subclasses


class Wider(VisionTransformer):
    """A subclass that changes what leaves the forward pass as it is."""

    def _pos_embed(self, x):
        return super()._pos_embed(x) + 1


class OwnHead(VisionTransformer):
    def forward_head(self, x, pre_logits=False):
        return self.head(x.mean(dim=1))  # reads all tokens, whatever global_pool says


class OwnPool(VisionTransformer):
    def pool(self, x, pool_type=None):
        return x[:, 1:].amax(dim=1)


class OwnForward(VisionTransformer):
    def forward_features(self, x):
        return 2 * super().forward_features(x)


SMALL = dict(img_size=48, patch_size=8, embed_dim=48, num_heads=3, depth=6, num_classes=5)


@pytest.mark.parametrize('dense_cls', [Wider, OwnHead, OwnPool])
def test_subclasses_keep_what_they_change(dense_cls):
    dense = dense_cls(**SMALL).eval()
    x = images(dense)
    evolved = evolve(copy.deepcopy(dense), keep_ratio=1.0)
    assert isinstance(evolved, dense_cls) and type(evolved).__name__ == f'Evo{dense_cls.__name__}'
    torch.testing.assert_close(evolved(x), dense(x))
    evolved.set_evolution(keep_ratio=0.5)
    torch.testing.assert_close(evolved(x), evolved.forward_head(evolved.forward_features(x)))
    for copied in (copy.deepcopy(evolved), pickle.loads(pickle.dumps(evolved))):
        assert type(copied) is type(evolved) and torch.equal(copied(x), evolved(x))
    assert type(restore(evolved)) is dense_cls


# Changes at run time


def test_set_evolution_is_as_if_created_so():
    dense = create('vit_tiny_patch16_224')
    model = evolve(copy.deepcopy(dense))
    changes = [
        dict(keep_ratio=0.7), dict(selection='layer'), dict(start_block=3, stage_depth=1, fast_update=False),
        dict(keep_ratio=[0.5, 0.4, 0.3], tradeoff=0.2, selection='stage'),
        dict(selection='similarity', keep_ratio=0.6, stage_depth=None, tradeoff=None, fast_update=True)]
    settings = {}
    for change in changes:
        settings |= change
        model.set_evolution(**change)
        assert torch.equal(model(images(model)), evolve(copy.deepcopy(dense), **settings)(images(model)))


@pytest.mark.parametrize('arguments, error, message', [
    (dict(keep_ratio=0), ValueError, 'keep_ratio=0 is not allowed'),
    (dict(start_block=6), ValueError, r'start_block=6 .* 1\.\.5'),
    (dict(keep_ratios=0.5), TypeError, r'keep_ratios is not an argument of .* Did you mean keep_ratio\?'),
    (dict(class_head=True), TypeError, 'class_head cannot change at run time'),
])
def test_a_refused_change_leaves_the_model_as_it_was(arguments, error, message):
    model = evolve(create('vit_tiny_patch16_224'))
    logits, evolution = model(images(model)), copy.deepcopy(model.evolution)
    with pytest.raises(error, match=message):
        model.set_evolution(**arguments)
    assert model.evolution == evolution and torch.equal(model(images(model)), logits)


def selections(model: nn.Module) -> dict[int, float]:
    """Keep ratio by the block that selects."""
    begins, keep_ratio, _, _ = model.schedule
    return {i: ratio for i, ratio in enumerate(keep_ratio) if begins[i] and ratio < 1}


def test_counting_continues_after_a_change():
    model = evolve(create('vit_tiny_patch16_224'), selection='stage', layerwise_updates=3)
    optimizer = sgd(model)
    optimizer.step()
    optimizer.step()
    model.set_evolution(keep_ratio=0.7)
    assert model.num_updates == 2 and selections(model) == {2: 0.7, 3: 0.7, 4: 0.7, 5: 0.7}
    optimizer.step()
    assert model.num_updates == 3 and selections(model) == {2: 0.7, 4: 0.7}


def test_counting_begins_and_ends_with_a_change():
    model = evolve(create('vit_tiny_patch16_224'), selection='stage')
    optimizer = sgd(model)
    for _ in range(2):
        model.set_evolution(layerwise_updates=1)
        assert selections(model) == {2: 0.5, 3: 0.5, 4: 0.5, 5: 0.5}
        optimizer.step()
        assert model.num_updates == 1 and selections(model) == {2: 0.5, 4: 0.5}
        model.set_evolution(layerwise_updates=0)
        optimizer.step()
        assert model.num_updates is None


def test_a_model_that_has_lost_its_last_blocks_keeps_its_segments():
    model = timm.create_model(
        'evo_vit_tiny_patch16_224', img_size=48, patch_size=8, features_only=True, out_indices=(3, 7),
        selection='stage').eval()
    assert selections(model.model) == {4: 0.5}
    model.model.set_evolution(fast_update=False, keep_ratio=[0.5, 0.4])
    assert selections(model.model) == {4: 0.5}


def skip_without_arguments(model: nn.Module) -> None:
    if not hasattr(model, '_model_args'):
        pytest.skip(f'timm {timm.__version__} does not note the arguments of its models')


def test_a_saved_model_has_the_arguments_as_they_were_set(tmp_path):
    model = timm.create_model('evo_test_vit', img_size=48).eval()
    skip_without_arguments(model)
    model.set_evolution(keep_ratio=0.7)
    hub.save(model, tmp_path / 'model')
    loaded = load_folder(tmp_path / 'model').eval()
    assert torch.equal(loaded(images(model)), model(images(model)))


def test_a_model_that_would_be_dense_again_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match='would load this model as the dense test_vit'):
        hub.save(evolve(timm.create_model('test_vit')), tmp_path / 'model')
    assert not list(tmp_path.iterdir())


def test_a_dense_model_is_not_saved_as_an_evolved_one(tmp_path):
    dense, evolved = (timm.create_model(name, img_size=48) for name in ('test_vit', 'evo_test_vit'))
    for model, message in {
        dense: "VisionTransformer is not evolved. timm's save_for_hf and push_to_hf_hub write a dense model",
        nn.Sequential(evolved): 'Sequential is not evolved, but its submodule `.0` is. Use that one',
        torch.compile(evolved): 'OptimizedModule is not evolved, but its submodule `._orig_mod` is. Use that one',
    }.items():
        with pytest.raises(TypeError, match=message):
            hub.save(model, tmp_path / 'model')
        with pytest.raises(TypeError, match=message):
            hub.push(model, 'somebody/model')
        with pytest.raises(TypeError, match=message):
            hub.model_card(model, 'name')
    assert not list(tmp_path.iterdir())


def test_an_instance_that_evolve_has_made_is_saved_by_timm_as_dense(tmp_path):
    model = evolve(timm.create_model('test_vit'))
    skip_without_arguments(model)
    model.set_evolution(keep_ratio=0.7)
    save_for_hf(model, tmp_path / 'model', safe_serialization=True)
    loaded = load_folder(tmp_path / 'model')
    assert type(loaded) is VisionTransformer


@pytest.mark.parametrize('name', ['evo_test_vit', 'test_vit'])
def test_a_restored_model_is_saved_as_dense(name, tmp_path):
    model = timm.create_model(name).eval()
    skip_without_arguments(model)
    if name == 'test_vit':
        evolve(model)
    model.set_evolution(keep_ratio=0.7)
    assert restore(model).pretrained_cfg['architecture'] == 'test_vit'
    save_for_hf(model, tmp_path / 'model', safe_serialization=True)
    loaded = load_folder(tmp_path / 'model').eval()
    x = torch.randn(2, 3, 160, 160)
    assert type(loaded) is VisionTransformer and torch.equal(loaded(x), model(x))


def test_a_model_without_a_dense_twin_is_restored_to_what_it_was_built_from(tmp_path):
    model = timm.create_model('evo_deit_small_patch16_384', embed_dim=48, depth=4, num_heads=3).eval()
    skip_without_arguments(model)
    restore(model)
    assert model.pretrained_cfg['architecture'] == 'deit_small_patch16_224'
    save_for_hf(model, tmp_path / 'model', safe_serialization=True)
    loaded = load_folder(tmp_path / 'model').eval()
    x = torch.randn(1, 3, 384, 384)
    assert type(loaded) is VisionTransformer and torch.equal(loaded(x), model(x))


def test_a_model_that_timm_has_not_created_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match='cannot load EvoVisionTransformer again, because'):
        hub.save(evolve(VisionTransformer(**SMALL)), tmp_path / 'model')


def test_the_card_of_a_model_with_attention_pooling():
    assert 'GMACs' in hub.model_card(timm.create_model('evo_test_vit3'), 'name')['details']['Model Stats']


def test_a_compiled_model_is_compiled_once_more():
    model = evolve(create('vit_tiny_patch16_224'))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for keep_ratio, graphs in ((0.5, 1), (0.7, 2), (0.5, 2), (0.7, 2)):
            model.set_evolution(keep_ratio=keep_ratio)
            torch.testing.assert_close(compiled(images(model)), model(images(model)))
            assert counter.frame_count == graphs


# What cannot be evolved


@pytest.mark.parametrize('name, reason', [
    ('resnet18', 'ResNet cannot be evolved, because it has no attention and no tokens to select'),
    ('beit_base_patch16_224', 'Beit cannot be evolved, because its attention has biases by relative position'),
    ('vit_relpos_small_patch16_224', 'VisionTransformerRelPos cannot .* biases by relative position'),
    ('swin_tiny_patch4_window7_224', 'SwinTransformer cannot .* biases by relative position'),
    ('naflexvit_base_patch16_gap', "NaFlexVit cannot be evolved, because its forward pass is not that of timm's"),
])
def test_refused_by_name_with_the_reason(name, reason):
    model = timm.create_model(name)
    attributes, keys = set(vars(model)), model.state_dict().keys()
    with pytest.raises(TypeError, match=reason):
        evolve(model)
    assert set(vars(model)) == attributes and model.state_dict().keys() == keys
    assert 'Evo' not in type(model).__name__


def test_other_refusals():
    with pytest.raises(TypeError, match='OwnForward cannot be evolved, because it overrides forward_features'):
        evolve(OwnForward(**SMALL))
    model = evolve(VisionTransformer(**SMALL))
    with pytest.raises(TypeError, match='EvoVisionTransformer is evolved already. Use its set_evolution'):
        evolve(model)
    with pytest.raises(TypeError, match='VisionTransformer is not evolved'):
        restore(restore(model))
    with pytest.raises(ValueError, match='keep_ratio=0.01 of 36 patch tokens'):
        evolve(VisionTransformer(**SMALL), selection='stage', keep_ratio=0.01)
    with pytest.raises(TypeError, match=r'keep_ratios is not an argument of .* Did you mean keep_ratio\?'):
        evolve(VisionTransformer(**SMALL), keep_ratios=0.5)


@pytest.mark.parametrize('wrap', [
    torch.compile,
    torch.nn.DataParallel,
    lambda model: timm.create_model('test_vit', features_only=True),
], ids=['compiled', 'parallel', 'features'])
def test_a_wrapped_model_is_evolved_before(wrap):
    with pytest.raises(TypeError, match=r'cannot be evolved, but its submodule .* \(VisionTransformer\) can'):
        evolve(wrap(VisionTransformer(**SMALL)))


def test_public_names():
    assert timm_evo.evolve is evolve and timm_evo.restore is restore
    assert isinstance(evolve(VisionTransformer(**SMALL)), EvoVisionTransformer)


def test_numbers_of_numpy_are_numbers(tmp_path):
    dense = create('vit_tiny_patch16_224')
    model = evolve(copy.deepcopy(dense), selection='stage', keep_ratio=np.float32(0.5), start_block=np.int64(3))
    model.set_evolution(tradeoff=np.array([0.25] * 6))
    assert model.evolution['start_block'] == 3 and type(model.evolution['tradeoff']) is list
    expected = evolve(dense, selection='stage', keep_ratio=0.5, start_block=3, tradeoff=[0.25] * 6)
    assert torch.equal(model(images(model)), expected(images(expected)))
