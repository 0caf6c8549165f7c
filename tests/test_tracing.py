"""`timm_evo.trace`: selections of a model, compared with the slow implementations, also through wrappers."""
import copy

import pytest
import slow_evolution
import slow_levit
import small_vits
import test_levit
import test_method
import test_similarity
import timm
import torch
from slow_similarity import average_slowly
from timm.utils import ModelEmaV3
from torch import nn

import timm_evo


def assert_published(selection: timm_evo.Selection, slow: list[set], scores: list, fast_update: bool) -> None:
    """Against the slow patches and the scores of each image."""
    positions = torch.arange(selection.slow[0].numel())
    for image, (chosen, of) in enumerate(zip(slow, scores, strict=True)):
        assert set(selection.slow[image].flatten().nonzero().flatten().tolist()) == chosen
        torch.testing.assert_close(selection.scores[image].flatten(), torch.stack(of), rtol=0, atol=1e-9)
        is_slow = torch.tensor([position in chosen for position in positions.tolist()])
        expected = positions.where(is_slow, -1 if fast_update else -2)
        assert torch.equal(selection.follows[image].flatten(), expected)


@pytest.mark.parametrize('kind', test_method.KINDS)
@pytest.mark.parametrize('seed', range(2))
@torch.no_grad()
def test_published_selections_of_a_vit(kind, seed):
    settings = test_method.random_settings(1000 + 100 * seed + len(kind))
    model = test_method.build(seed=seed, **test_method.KINDS[kind], **settings).eval()
    images = torch.randn(3, 3, 24, 24, dtype=torch.float64)
    expected = []
    slow_evolution.evolve_slowly(model, images, **test_method.slow_arguments(settings), selected=expected)
    selections = timm_evo.trace(model, images)
    assert [selection.block for selection in selections] == [block for block, *_ in expected[0]]
    for selection, per_image in zip(selections, zip(*expected, strict=True), strict=True):
        assert selection.slow.shape == selection.scores.shape == selection.follows.shape == (3, 6, 6)
        _, slow, scores = zip(*per_image, strict=True)
        assert_published(selection, slow, scores, settings['fast_update'])


@pytest.mark.parametrize('kind', [*test_method.KINDS, 'not square'])
@pytest.mark.parametrize('seed', range(2))
@torch.no_grad()
def test_averages_of_a_vit(kind, seed):
    settings = test_similarity.random_settings(1000 + 100 * seed + len(kind))
    kinds = test_method.KINDS | {'not square': dict(img_size=(24, 16))}
    model = test_method.build(seed=seed, **kinds[kind], **settings).eval()
    images = torch.randn(3, 3, *model.patch_embed.img_size, dtype=torch.float64)
    expected = []
    average_slowly(model, images, model.schedule.keep_ratio, selected=expected)
    selections = timm_evo.trace(model, images)
    assert [selection.block for selection in selections] == [block for block, _ in expected[0]]
    for selection, per_image in zip(selections, zip(*expected, strict=True), strict=True):
        assert selection.scores is None and selection.slow.shape[1:] == model.patch_embed.grid_size
        for image, (_, groups) in enumerate(per_image):
            follows = {place: group[0] for group in groups for place in group}
            assert selection.follows[image].flatten().tolist() == [follows[place] for place in range(len(follows))]
            slow = set(selection.slow[image].flatten().nonzero().flatten().tolist())
            assert slow == {group[0] for group in groups}


@pytest.mark.parametrize('scheme', test_levit.SCHEMES)
@pytest.mark.parametrize('seed', range(3))
@torch.no_grad()
def test_selections_of_a_levit(scheme, seed):
    settings, slow_settings = test_levit.random_settings(1000 + 10 * seed + len(scheme))
    model = test_levit.build(seed, **test_levit.SCHEMES[scheme], **settings).eval()
    expected = []
    slow_levit.evolve_slowly(model, test_levit.images(), **slow_settings, selected=expected)
    selections = timm_evo.trace(model, test_levit.images())
    firsts = [0, 2, 5]  # of the stages
    assert [selection.block for selection in selections] == [firsts[s] + block for (s, block), *_ in expected]
    for selection, ((stage, _), slow, scores) in zip(selections, expected, strict=True):
        assert selection.slow.shape[1:] == [(8, 6), (4, 3), (2, 2)][stage]
        assert_published(selection, slow, scores, settings['fast_update'])


def assert_equal(actual: list[timm_evo.Selection], expected: list[timm_evo.Selection]) -> None:
    assert actual and len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


SMALL = dict(img_size=48, patch_size=8, embed_dim=48, num_heads=3, depth=6)


@pytest.mark.parametrize('name', ['evo_vit_tiny_patch16_224', 'evo_deit_tiny_patch16_224', 'evo_levit_128s'])
def test_through_wrappers(name):
    kwargs = dict(img_size=128) if 'levit' in name else SMALL
    model = timm.create_model(name, **kwargs).eval()
    images = torch.randn(2, 3, kwargs['img_size'], kwargs['img_size'])
    expected = timm_evo.trace(model, images)
    wrapped = [nn.ModuleDict({'deep': nn.Sequential(nn.Identity(), model)}), torch.compile(model), ModelEmaV3(model)]
    for wrapper in wrapped:
        assert_equal(timm_evo.trace(wrapper, images), expected)
    backbone = timm.create_model(name, **kwargs, features_only=True)
    backbone.load_state_dict({f'model.{key}': value for key, value in model.state_dict().items()}, strict=False)
    if hasattr(model, 'norm'):
        model.norm = nn.Identity()  # which the backbone has lost, and which tells similarity what is alike
    assert_equal(timm_evo.trace(backbone.eval(), images), timm_evo.trace(model, images))


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('name', ['evo_vit_tiny_patch16_224', 'evo_deit_tiny_patch16_224', 'evo_levit_cls_128s'])
def test_nothing_of_the_model_changes(name, training):
    kwargs = dict(img_size=128) if 'levit' in name else SMALL | dict(drop_path_rate=0.5, patch_drop_rate=0.5)
    model = timm.create_model(name, **kwargs).train(training)
    images = torch.randn(2, 3, kwargs['img_size'], kwargs['img_size'])
    expected = timm_evo.trace(copy.deepcopy(model).eval(), images)
    state, text, classes = copy.deepcopy(model.state_dict()), repr(model), [type(m) for m in model.modules()]
    names = [sorted(vars(module)) for module in model.modules()]
    with torch.random.fork_rng():
        assert_equal(timm_evo.trace(model, images), expected)
    assert [type(m) for m in model.modules()] == classes and repr(model) == text
    assert [sorted(vars(module)) for module in model.modules()] == names
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_hybrids_and_image_sizes_have_their_own_grids():
    model = small_vits.create('evo_vit_tiny_r_s16_p8_224')
    assert timm_evo.trace(model, small_vits.images(model))[0].slow.shape == (2, 6, 6)
    model = timm.create_model('evo_vit_tiny_patch16_224', dynamic_img_size=True, depth=4).eval()
    assert timm_evo.trace(model, torch.randn(1, 3, 64, 112))[0].slow.shape == (1, 4, 7)


def test_a_dense_model_has_nothing_to_trace():
    with pytest.raises(TypeError, match='VisionTransformer cannot be traced, because it is not evolved'):
        timm_evo.trace(timm.create_model('test_vit'), torch.randn(1, 3, 160, 160))
    model = timm.create_model('evo_test_vit', keep_ratio=1.0)
    assert timm_evo.trace(model, torch.randn(1, 3, 160, 160)) == []
