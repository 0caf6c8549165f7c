"""Selection by similarity: what a model computes, against an obvious implementation, and what follows from it."""
import copy
import random

import pytest
import timm
import torch
from slow_evolution import assert_equal_after_every_block, assert_equal_gradients
from slow_similarity import average_slowly
from test_method import KINDS, SMALL, build

import timm_evo
from timm_evo import count_gmacs
from timm_evo.method import similarity
from timm_evo.method.schedule import make_similarity_schedule


def random_settings(seed: int) -> dict:
    rng = random.Random(seed)
    start_block = rng.choice([None, 1, 2, 4])
    shares = [1.]
    for _ in range(SMALL['depth'] - (start_block or 1)):
        shares.append(shares[-1] * rng.choice([1., 1., rng.uniform(0.5, 1)]))
    keep_ratio = rng.choice([rng.uniform(0.5, 1), shares[1:]])
    return dict(selection='similarity', start_block=start_block, keep_ratio=keep_ratio)


@pytest.mark.parametrize('kind', [*KINDS, 'not square', 'odd grid', 'norm after pooling'])
@pytest.mark.parametrize('seed', range(3))
@torch.no_grad()
def test_equals_the_obvious_implementation(kind, seed):
    more = {
        'not square': dict(img_size=(24, 16)),
        'odd grid': dict(img_size=(20, 12)),
        'norm after pooling': dict(global_pool='avg', fc_norm=True),
    }
    settings = random_settings(100 * seed + len(kind))
    model = build(seed=seed, **(KINDS | more)[kind], **settings).eval()
    images = torch.randn(3, 3, *model.patch_embed.img_size, dtype=torch.float64)

    expected = average_slowly(model, images, model.schedule.keep_ratio)
    assert_equal_after_every_block(model, images, expected, str(settings))


@pytest.mark.parametrize('kind', ['class token', 'no class token', 'qk norm', 'distilled'])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_gradients_equal_the_obvious_implementation(kind, checkpointing):
    model = build(**KINDS[kind], selection='similarity', keep_ratio=0.6)
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    expected = model.forward_head(model.norm(average_slowly(model, images, model.schedule.keep_ratio)[-1]))
    assert_equal_gradients(model, model(images), expected)


@pytest.mark.parametrize('keep_ratio', [0.3, 0.5, 0.7])
@pytest.mark.parametrize('name', ['deit_small_patch16_224', 'deit_base_patch16_384', 'vit_large_patch16_224'])
def test_a_keep_ratio_costs_about_the_same_in_each_selection(name, keep_ratio):
    with torch.device('meta'):
        model = timm.create_model(f'evo_{name}', keep_ratio=keep_ratio).eval()
    image = torch.zeros(1, *model.default_cfg['input_size'], device='meta')
    gmacs = {}
    for selection in ('stage', 'similarity'):
        model.set_evolution(selection=selection)
        gmacs[selection] = count_gmacs(model, image)
    assert gmacs['similarity'] == pytest.approx(gmacs['stage'], rel=0.03)


def test_a_keep_ratio_is_the_mean_share_over_the_evolved_blocks_but_the_last():
    for depth, start_block, keep_ratio in ((12, 4, 0.5), (12, 2, 0.7), (24, 8, 0.35), (7, 1, 0.6)):
        begins, shares, scored, _ = make_similarity_schedule(depth, keep_ratio, start_block)
        assert shares[:start_block] == [1.] * start_block
        assert sum(shares[start_block:-1]) / (depth - 1 - start_block) == pytest.approx(keep_ratio)
        assert shares[-1] == shares[-2] and not any(scored)
        step = 2 if depth == 24 else 1
        assert [i for i, begin in enumerate(begins) if begin] == list(range(start_block, depth - 1, step))[:5]


@pytest.mark.parametrize('depth, keep_ratio, events', [
    (12, 0.9, [3, 4, 5, 6, 7]), (12, 0.5, [3, 4, 5, 6, 7]), (12, 0.35, [2, 3, 4, 5, 6, 7]),
    (12, 0.15, [1, 2, 3, 4, 5, 6, 7]), (24, 0.5, [6, 8, 10, 12, 14]), (24, 0.3, [4, 6, 8, 10, 12, 14]),
    (40, 0.7, [10, 13, 16, 19, 22]), (4, 0.5, [1, 2])])
def test_by_default_a_quarter_of_the_blocks_is_dense_and_no_event_takes_more_than_a_fifth(depth, keep_ratio, events):
    begins, shares, _, _ = make_similarity_schedule(depth, keep_ratio, None)
    assert [i for i, begin in enumerate(begins) if begin] == events
    factors = [shares[i] / shares[i - 1] for i in events]
    assert factors == pytest.approx([factors[0]] * len(events))
    assert factors[0] >= 0.8 or events[0] == 1


def test_keep_ratio_one_is_the_dense_model():
    dense = timm.create_model('test_vit').eval()
    evolved = timm.create_model('evo_test_vit', keep_ratio=1.0).eval()
    evolved.load_state_dict(dense.state_dict(), strict=True)
    images = torch.randn(2, *dense.default_cfg['input_size'])
    assert not any(evolved.schedule.begins)
    torch.testing.assert_close(evolved(images), dense(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize('seed', range(3))
def test_output_of_an_image_does_not_depend_on_the_rest_of_its_batch(seed):
    model = build(seed=seed, selection='similarity').eval()
    images = torch.randn(5, 3, 24, 24, dtype=torch.float64)
    together = model(images)
    alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(together, model(images.flip(0)).flip(0), rtol=0, atol=1e-10)


@pytest.mark.parametrize('batch_size', [0, 1])
@pytest.mark.parametrize('training', [False, True])
def test_small_batches_work_as_in_the_dense_model(batch_size, training):
    model = timm.create_model('evo_vit_tiny_patch16_224', img_size=64, depth=6).train(training)
    images = torch.randn(batch_size, 3, 64, 64)
    assert model(images).shape == (batch_size, 1000)
    assert model.forward_features(images).shape == (batch_size, 17, 192)
    model(images).sum().backward()


def test_equal_patches_are_averaged_without_loss():
    """Two grids that repeat one patch each, side by side: every token that goes has an equal one to follow."""
    model = build(selection='similarity', keep_ratio=0.6).eval()
    with torch.no_grad():
        model.pos_embed.zero_()
    images = torch.zeros(1, 3, 24, 24, dtype=torch.float64)
    images[..., :12], images[..., 12:] = 1, -1
    averaged = model(images), model.forward_features(images)
    model.set_evolution(keep_ratio=1.0)
    for actual, dense in zip(averaged, (model(images), model.forward_features(images)), strict=True):
        torch.testing.assert_close(actual, dense, rtol=0, atol=1e-9)


@pytest.mark.parametrize('fill', ['load', 'assign on the meta device', 'averaged', 'copied', 'at the creation'])
def test_a_backbone_is_what_its_state_dict_says(fill, tmp_path):
    """A backbone of `features_only=True` has no final norm, so no weight of it may decide which tokens are alike."""
    name, dense = 'evo_deit3_small_patch16_224', 'deit3_small_patch16_224'
    small = dict(img_size=48, patch_size=8, embed_dim=48, num_heads=3, depth=6)
    torch.manual_seed(0)
    whole = timm.create_model(name, **small)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    torch.save(whole.state_dict(), tmp_path / 'whole.pth')
    backbone = dict(small, features_only=True, out_indices=(1, 4))
    filled = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'whole.pth'), num_classes=1000))
    first = timm.create_model(name, **backbone, **filled).eval()
    assert first.state_dict().keys() == timm.create_model(dense, **backbone).state_dict().keys()

    if fill == 'load':
        other = timm.create_model(name, **backbone)
        other.load_state_dict(first.state_dict(), strict=True)
    elif fill == 'assign on the meta device':
        with torch.device('meta'):
            other = timm.create_model(name, **backbone)
        other.load_state_dict(first.state_dict(), strict=True, assign=True)
    elif fill == 'averaged':
        other = timm.utils.ModelEmaV3(timm.create_model(name, **backbone), decay=0.)
        other.update(first)
    elif fill == 'copied':
        other = copy.deepcopy(first)
    else:
        other = timm.create_model(name, **backbone, **filled)
    images = torch.randn(2, 3, 48, 48)
    for actual, wanted in zip(other.eval()(images), first(images), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_a_model_without_a_final_norm_compares_the_tokens_as_they_are():
    model = build(selection='similarity').eval()
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    model.prune_intermediate_layers([4], prune_norm=True)
    expected = average_slowly(model, images, model.schedule.keep_ratio)
    assert_equal_after_every_block(model, images, expected, 'pruned')
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images), model(images), rtol=0, atol=1e-9)


@pytest.mark.parametrize('size, keep_ratio', [
    ((4, 8), 0.7), ((12, 4), 0.55), ((12, 12), [0.5, 0.25, 0.125, 0.12, 0.12]), ((4, 12), 0.9)])
@torch.no_grad()
def test_a_grid_of_a_few_patches_goes_down_to_one(size, keep_ratio):
    model = build(img_size=size, depth=6, selection='similarity', keep_ratio=keep_ratio).eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = average_slowly(model, images, model.schedule.keep_ratio)
    assert_equal_after_every_block(model, images, expected, str(keep_ratio))
    for selection in timm_evo.trace(model, images):
        assert selection.follows.shape[1:] == model.patch_embed.grid_size


@pytest.mark.parametrize('value', [0., -1.])
def test_tokens_that_are_zero_or_cancel_out_give_finite_numbers(value):
    x = torch.ones(1, 4, 3)
    x[:, ::2] = value
    goes, into = torch.tensor([[0, 2]]), torch.tensor([[1, 3]])
    left, follows = similarity.places_after(goes, into, 4)
    assert left.tolist() == [[1, 3]] and follows.tolist() == [[0, 0, 1, 1]]
    for tokens in (x, torch.zeros_like(x)):
        averages, size = similarity.average_tokens(tokens, None, goes, into, left)
        assert averages.isfinite().all() and size.log().isfinite().all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype):
    torch.manual_seed(0)
    model = timm.create_model('evo_vit_tiny_patch16_224', img_size=96).eval()
    images = torch.randn(4, 3, 96, 96)
    expected = model(images)
    with torch.autocast('cpu', dtype):
        autocast = model(images)
    for logits in (autocast, model.to(dtype)(images.to(dtype))):
        assert torch.nn.functional.cosine_similarity(logits.float(), expected).min() > 0.99


def test_the_selection_changes_at_run_time():
    model = timm.create_model('evo_deit_tiny_patch16_224', img_size=64)
    assert model.evolution['selection'] == 'stage'
    dense_keys = list(model.state_dict())
    model.set_evolution(selection='similarity', keep_ratio=0.7)
    assert model.evolution['selection'] == 'similarity' and list(model.state_dict()) == dense_keys
    model.set_evolution(selection='layer', tradeoff=0.3)
    assert model.evolution['selection'] == 'layer'


def test_the_papers_own_names_are_as_published_and_all_others_take_similarity():
    for name, selection in (
            ('evo_deit_tiny_patch16_224', 'stage'), ('evo_deit_tiny_distilled_patch16_224', 'stage'),
            ('evo_deit_small_patch16_384', 'stage'), ('evo_levit_128s', 'stage'), ('evo_levit_cls_128s', 'stage'),
            ('evo_deit3_small_patch16_224', 'similarity'), ('evo_vit_small_patch16_224', 'similarity')):
        with torch.device('meta'):
            assert timm.create_model(name).evolution['selection'] == selection, name
    assert timm_evo.evolve(timm.create_model('test_vit')).evolution['selection'] == 'similarity'
    assert timm_evo.evolve(timm.create_model('levit_128s')).evolution['selection'] == 'stage'


@pytest.mark.parametrize('argument, value, needed', [
    ('tradeoff', 0.5, "selection='stage' or 'layer'"),
    ('tradeoff', 0, "selection='stage' or 'layer'"),
    ('fast_update', False, "selection='stage' or 'layer'"),
    ('stage_depth', 1, "selection='stage'"),
    ('layerwise_updates', 10, "'stage'"),
])
def test_arguments_of_the_published_selections_are_refused_by_similarity(argument, value, needed):
    with pytest.raises(ValueError, match=f'{argument}={value!r} is not allowed.*{needed}'):
        timm_evo.evolve(timm.create_model('test_vit'), **{argument: value})


def test_shares_that_are_not_possible_are_refused():
    model = timm.create_model('evo_vit_tiny_patch16_224', img_size=64)
    with pytest.raises(ValueError, match='11 here'):
        model.set_evolution(keep_ratio=[0.9] * 12)
    with pytest.raises(ValueError, match='0.8 cannot follow one of 0.7'):
        model.set_evolution(keep_ratio=[0.7, 0.8] + [0.6] * 9)
    with pytest.raises(ValueError, match='0.3 cannot follow one of 1'):
        model.set_evolution(keep_ratio=[0.3] * 11)
    with pytest.raises(ValueError, match='must be at least 0.1125'):
        model.set_evolution(keep_ratio=0.05, start_block=1)
    with pytest.raises(ValueError, match='leaves none'):
        timm.create_model('evo_vit_tiny_patch16_224', img_size=32, keep_ratio=0.1)
    with pytest.raises(ValueError, match='not allowed for LeViT'):
        timm.create_model('evo_levit_128s', selection='similarity')
