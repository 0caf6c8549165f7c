"""Evo-LeViT: what it computes, against an obvious implementation, and what timm promises of its LeViT."""
import copy
import pickle
import random
import warnings

import pytest
import timm
import torch
from slow_levit import evolve_slowly
from timm.models import group_parameters
from timm.models.levit import Levit, LevitDistilled
from timm.utils import reparameterize_model
from torch import nn
from torch.func import functional_call, grad, vmap

from timm_evo import EvoLevit, evolve, restore
from timm_evo.method.schedule import make_pyramid_schedule

SCHEMES = {'biases': dict(), 'class token': dict(class_token=True)}
NAMES = ['evo_levit_128s', 'evo_levit_cls_128s']
SMALL = dict(embed_dim=(16, 24, 32), key_dim=8, depth=(2, 3, 2), num_heads=(2, 3, 4), num_classes=5)


def shake(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Move all weights and statistics, because fresh residual branches are zero and attention is even."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (1 if 'attention_biases' in name else scale))
        for name, buffer in model.named_buffers():
            if name.endswith('running_mean'):
                buffer.normal_(0, 0.1)
            if name.endswith('running_var'):
                buffer.uniform_(0.7, 1.5)
    return model


def build(seed: int = 0, img_size: tuple[int, int] = (128, 96), **kwargs) -> EvoLevit:
    """A small model in float64 with a grid of 8 x 6, 4 x 3 and 2 x 2 patches."""
    torch.manual_seed(seed)
    return shake(EvoLevit(img_size, **(SMALL | kwargs)).double())


def images(batch_size: int = 2, height: int = 128, width: int = 96, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(batch_size, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(1))


def create(name: str = NAMES[0], seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return shake(timm.create_model(name, **(SMALL | dict(img_size=128) | kwargs)), 0.1).eval()


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


# For what takes compilers and exporters long: the schemes differ in biases and class token alone.
ONE_QUICK = pytest.mark.parametrize(
    'name', [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])


# The method


def random_settings(seed: int) -> tuple[dict, dict]:
    """Settings of the model, and the same as the slow implementation takes them, worked out independently."""
    rng = random.Random(seed)
    start_block, selection = rng.randint(1, 6), rng.choice(['stage', 'layer'])
    blocks = [(stage, block) for stage, depth in enumerate(SMALL['depth']) for block in range(depth)]
    evolved = blocks[start_block:]
    firsts = evolved if selection == 'layer' else [b for b in evolved if b == evolved[0] or b[1] == 0]
    ratios = [rng.choice([0.3, 0.5, 0.8, 1.0]) for _ in firsts]
    alphas = [rng.choice([0.2, 0.5, 0.9]) for _ in range(len(blocks) + 2)]
    fast_update = rng.random() < 0.7
    settings = dict(start_block=start_block, selection=selection, keep_ratio=ratios, tradeoff=alphas)
    return settings | dict(fast_update=fast_update), dict(
        keep_ratios=dict(zip(firsts, ratios, strict=True)), tradeoff=alphas, fast_update=fast_update)


@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('seed', range(6))
@torch.no_grad()
def test_equals_the_obvious_implementation(scheme, seed):
    settings, slow_settings = random_settings(10 * seed + len(scheme))
    model = build(seed, **SCHEMES[scheme], **settings).eval()
    expected = evolve_slowly(model, images(), **slow_settings)
    final, intermediates = model.forward_intermediates(images())
    for (height, width), actual, wanted in zip([(8, 6), (4, 3), (2, 2)], intermediates, expected, strict=True):
        wanted = wanted[:, model.num_prefix_tokens:].transpose(1, 2).unflatten(2, (height, width))
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9, msg=lambda m: f'{settings}: {m}')
    torch.testing.assert_close(final, expected[-1], rtol=0, atol=1e-9)
    torch.testing.assert_close(model(images()), model.forward_head(expected[-1]), rtol=0, atol=1e-9)


@pytest.mark.parametrize('learn_tradeoff', [False, True])
@pytest.mark.parametrize('selection', ['stage', 'layer'])
@pytest.mark.parametrize('scheme', SCHEMES)
def test_gradients_and_batch_statistics_equal_the_obvious_implementation(scheme, selection, learn_tradeoff):
    model = build(**SCHEMES[scheme], selection=selection, learn_tradeoff=learn_tradeoff).train()
    slow_model = copy.deepcopy(model)
    firsts = [(1, 0), (2, 0)] if selection == 'stage' else [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    alphas = [attn.learn_tradeoff.sigmoid() if learn_tradeoff else 0.5 for attn in slow_model._attentions()]

    logits = model(images(4))
    expected = slow_model.forward_head(evolve_slowly(slow_model, images(4), dict.fromkeys(firsts, 0.5), alphas)[-1])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    weight = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    for (name, a), e in zip(model.named_parameters(), slow_model.parameters(), strict=True):
        expected = torch.zeros_like(e) if e.grad is None else e.grad  # None where no weight came to depend on it
        torch.testing.assert_close(a.grad, expected, rtol=0, atol=1e-9 * max(1, expected.abs().max().item()), msg=name)
    for (name, a), e in zip(model.named_buffers(), slow_model.buffers(), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize('size', ['128s', '128', pytest.param('256', marks=pytest.mark.slow)])
@pytest.mark.parametrize('training', [False, True])
def test_keep_ratio_one_is_the_dense_model(size, training):
    torch.manual_seed(0)
    dense = shake(timm.create_model(f'levit_{size}'), 0.02).double().train(training)
    evolved = timm.create_model(f'evo_levit_{size}', keep_ratio=1.0).double().train(training)
    evolved.load_state_dict(dense.state_dict(), strict=True)
    x = images(2, 224, 224)
    logits, expected = evolved(x), dense(x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    for out in (logits, expected):
        out.square().mean().backward()
    for (name, a), e in zip(evolved.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad, rtol=0, atol=1e-9 * max(1, e.grad.abs().max().item()), msg=name)


@torch.no_grad()
def test_keep_ratio_one_is_the_dense_model_in_single_precision():
    dense = shake(timm.create_model('levit_256'), 0.02).eval()
    evolved = timm.create_model('evo_levit_256', keep_ratio=1.0).eval()
    evolved.load_state_dict(dense.state_dict(), strict=True)
    x = images(2, 224, 224, torch.float32)
    torch.testing.assert_close(evolved(x), dense(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize('settings', [
    dict(), dict(selection='layer'), dict(keep_ratio=0.3, fast_update=False), dict(start_block=1)])
def test_every_setting_has_the_state_dict_of_the_dense_model(settings):
    dense = timm.create_model('levit_128s')
    evolved = timm.create_model('evo_levit_128s', **settings)
    evolved.load_state_dict(dense.state_dict(), strict=True)
    assert list(evolved.state_dict()) == list(dense.state_dict())


def test_learned_tradeoffs_are_in_the_state_dict_whether_a_gradient_reaches_them_or_not():
    models = [create(NAMES[1], selection=selection) for selection in ('stage', 'layer')]
    assert set(models[0].state_dict()) == set(models[1].state_dict())
    learned = [{n for n, _ in model.named_parameters() if 'tradeoff' in n} for model in models]
    assert 'stages.0.blocks.0.attn.learn_tradeoff' not in learned[0] | learned[1], 'the first attention sets the scores'
    assert learned[1] - learned[0] == {'stages.2.blocks.0.attn.learn_tradeoff'}


@pytest.mark.parametrize('settings', [
    dict(), dict(selection='layer'), dict(class_head=True), dict(keep_ratio=1.0), dict(start_block=4),
    dict(learn_tradeoff=False, fast_update=False), dict(keep_ratio=[0.5, 1.0])])
def test_every_parameter_gets_a_gradient(name, settings):
    if name == NAMES[0]:
        settings = {k: v for k, v in settings.items() if k != 'class_head'}
    model = create(name, **settings).train()
    model(images(4, 128, 128, torch.float32)).square().sum().backward()
    assert not [n for n, parameter in model.named_parameters() if parameter.grad is None]


def test_learned_tradeoff_starts_at_the_fixed_one():
    fixed, learned = (build(class_token=True, tradeoff=0.3, learn_tradeoff=learn).eval() for learn in (False, True))
    missing, _ = learned.load_state_dict(fixed.state_dict(), strict=False)
    assert all('learn_tradeoff' in key for key in missing)
    for attn in learned._attentions():
        nn.init.constant_(attn.learn_tradeoff, torch.tensor(0.3, dtype=torch.float64).logit().item())
    torch.testing.assert_close(learned(images()), fixed(images()), rtol=0, atol=1e-9)
    fresh = EvoLevit(128, **SMALL, tradeoff=0.3, learn_tradeoff=True)
    torch.testing.assert_close(fresh.stages[1].blocks[0].attn.learn_tradeoff.sigmoid(), torch.tensor([0.3]))


@pytest.mark.parametrize('selection', ['stage', 'layer'])
@pytest.mark.parametrize('scheme', SCHEMES)
def test_output_of_an_image_does_not_depend_on_the_rest_of_its_batch(scheme, selection):
    model = build(**SCHEMES[scheme], selection=selection).eval()
    together = model(images(4))
    alone = torch.cat([model(image.unsqueeze(0)) for image in images(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize('num_traced, num_given', [(1, 4), (4, 1)])
@pytest.mark.parametrize('scheme', SCHEMES)
@torch.no_grad()
def test_trace_takes_other_batch_sizes_than_its_own(scheme, num_traced, num_given):
    model = build(**SCHEMES[scheme]).eval()
    traced = torch.jit.trace(model, images(num_traced))
    torch.testing.assert_close(traced(images(num_given)), model(images(num_given)), rtol=0, atol=1e-10)


@pytest.mark.parametrize('arguments, read', [
    (dict(), range(9)),  # up to the attention before the last selection, at entry 9
    (dict(selection='layer'), range(12)),
    (dict(keep_ratio=[0.5, 0.5, 1.0]), range(5)),
    (dict(keep_ratio=1.0), []),
])
def test_only_scores_that_a_later_selection_reads_are_computed(arguments, read):
    # entries: 4 blocks, downsampling at 4, blocks 5 to 7, downsampling at 8, blocks 9 to 12
    default = dict(depths=(4, 3, 4), keep_ratio=0.5, start_block=2, selection='stage', tradeoff=0.5)
    schedule = make_pyramid_schedule(**(default | arguments))
    assert [i for i, scored in enumerate(schedule.scored) if scored] == list(read)


# What timm promises


def test_heads(name):
    model = create(name)
    x = images(2, 128, 128, torch.float32)
    assert model(x).shape == (2, 5)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    assert create(name, in_chans=1)(x[:, :1]).shape == (2, 5)
    assert create(name, global_pool='', num_classes=0)(x).shape == (2, 4 + model.num_prefix_tokens, 32)


def test_class_heads_average_with_those_on_the_patch_mean():
    model = create(NAMES[1], class_head=True)
    x = images(4, 128, 128, torch.float32)
    features = model.forward_features(x)
    patches, class_token = features[:, 1:].mean(1), features[:, 0]
    logits = (model.head(patches) + model.head_cls(class_token)) / 2
    logits_dist = (model.head_dist(patches) + model.head_cls_dist(class_token)) / 2
    torch.testing.assert_close(model(x), (logits + logits_dist) / 2)
    model.set_distilled_training(True)
    assert isinstance(model(x), torch.Tensor)
    assert [out.shape for out in model.train()(x)] == [(4, 5), (4, 5)]
    assert [head.linear.out_features for head in model.get_classifier()] == [5] * 4
    model.reset_classifier(3)
    assert [head.linear.out_features for head in model.get_classifier()] == [3] * 4
    plain = set(create(NAMES[1]).state_dict())
    assert {key.split('.')[0] for key in set(create(NAMES[1], class_head=True).state_dict()) - plain} == {
        'head_cls', 'head_cls_dist'}


@pytest.mark.parametrize('img_size', [224, 384, (192, 320)])
def test_sizes(name, img_size):
    model = timm.create_model(name, img_size=img_size).eval()
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    maps = model.forward_intermediates(images(1, height, width, torch.float32), intermediates_only=True)
    height, width = height // 16, width // 16
    for y in maps:
        assert y.shape[2:] == (height, width)
        height, width = (height + 1) // 2, (width + 1) // 2


def test_features_only(name):
    torch.manual_seed(0)
    backbone = timm.create_model(name, features_only=True, out_indices=(0, 1), **SMALL, img_size=128).eval()
    x = images(2, 128, 128, torch.float32)
    assert [y.shape for y in backbone(x)] == [(2, 16, 8, 8), (2, 24, 4, 4)]
    assert backbone.feature_info.channels() == [16, 24] and backbone.feature_info.reduction() == [16, 32]
    whole = create(name)
    whole.load_state_dict(backbone.model.state_dict(), strict=False)
    expected = whole.forward_intermediates(x, indices=(0, 1), stop_early=True, intermediates_only=True)
    torch.testing.assert_close(backbone(x), expected)


def test_pruned_stages_leave_no_scores_that_nothing_reads(name):
    model, whole = create(name), create(name)
    x = images(2, 128, 128, torch.float32)
    model.prune_intermediate_layers([1])
    assert [attn.scored for attn in model._attentions()] == [True, True, True, False, False, False]
    torch.testing.assert_close(model.forward_intermediates(x)[1], whole.forward_intermediates(x)[1][:2])
    model.train()(x).sum().backward()
    assert not [n for n, parameter in model.named_parameters() if parameter.grad is None]


def test_groups_and_weight_decay(name):
    model = create(name)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {n for n, _ in model.named_parameters()}
    assert groups['stem.conv1.linear.weight'] < groups['stages.1.blocks.0.attn.qkv.linear.weight']
    skipped = model.no_weight_decay()
    if name == NAMES[0]:
        assert all('attention_biases' in n for n in skipped) and len(skipped) == 9
    else:
        embeds = {f'stages.{i}.downsample.attn_downsample.pos_embed' for i in (1, 2)}
        tradeoffs = {n for n, _ in model.named_parameters() if n.endswith('learn_tradeoff')}
        assert tradeoffs and skipped == {'cls_token', 'pos_embed'} | embeds | tradeoffs
        assert groups['cls_token'] == groups['pos_embed'] == 0


@pytest.mark.parametrize('settings', [dict(), dict(selection='layer')])
def test_grad_checkpointing_gives_the_same_gradients(name, settings):
    gradients = []
    for enable in (False, True):
        model = create(name, **settings).train()
        model.set_grad_checkpointing(enable)
        model(images(4, 128, 128, torch.float32)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_drop_path_is_random_in_training_only(name):
    model = create(name, drop_path_rate=0.5, drop_rate=0.1)
    x = images(4, 128, 128, torch.float32)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_evaluation_sees_the_biases_as_trained():
    model = create()
    x = images(2, 128, 128, torch.float32)
    before = model(x)
    model.train()
    for attn in model._attentions():
        nn.init.normal_(attn.attention_biases, std=3)
    after = model.eval()(x)
    assert (after - before).abs().max() > 1e-3
    fresh = create()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(after, fresh(x))


def test_device_and_dtype_moves(name):
    model = create(name)
    x = images(2, 128, 128, torch.float32)
    expected = model(x)
    torch.testing.assert_close(model.double()(x.double()).float(), expected, rtol=1e-3, atol=1e-3)
    logits = create(name).bfloat16()(x.bfloat16())
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    model = create(name).train()
    with torch.autocast('cpu', dtype=dtype):
        loss = model(images(4, 128, 128, torch.float32)).float().square().mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_reparameterize_fuses_every_batch_norm(name):
    model = create(name)
    fused = reparameterize_model(model)
    assert not [n for n, m in fused.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    x = images(2, 128, 128, torch.float32)
    torch.testing.assert_close(fused(x), model(x), rtol=0, atol=1e-4)


def test_torchscript(name):
    for model in (create(name), reparameterize_model(create(name, selection='layer'))):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', FutureWarning)  # torch.jit.script is deprecated
            scripted = torch.jit.script(model)
        for batch_size in (1, 3):
            x = images(batch_size, 128, 128, torch.float32)
            torch.testing.assert_close(scripted(x), model(x))


@ONE_QUICK
def test_compile_is_one_graph_in_inference_and_training(name):
    model = create(name, embed_dim=(16, 24), depth=(1, 1), num_heads=(2, 3), start_block=1)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend='aot_eager')  # inductor takes a minute
    x = images(4, 128, 128, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    for m in (model.train(), compiled.train()):
        m(x).square().sum().backward()
    for a, e in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad, rtol=1e-3, atol=1e-3 * max(1, e.grad.abs().max().item()))


@ONE_QUICK
def test_export_with_a_dynamic_batch(name):
    model, plain = create(name), create(name)  # an older torch leaves tensors without values in timm's cache of biases
    batch = torch.export.Dim('batch', min=1, max=64)
    x = images(5, 128, 128, torch.float32)
    exported = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},)).module()
    for batch_size in (1, 2, 5):
        torch.testing.assert_close(exported(x[:batch_size]), plain(x[:batch_size]))


def test_copies_travel(name):
    model = create(name)
    x = images(2, 128, 128, torch.float32)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


# Evolution given, changed, taken away


def test_evolve_and_restore_leave_the_dense_model_as_it_was():
    for kwargs in (dict(), dict(num_classes=0), dict(depth=(2, 2), embed_dim=(16, 24), num_heads=(2, 3))):
        dense = create('levit_128s', **kwargs)
        x = images(2, 128, 128, torch.float32)
        logits, keys = dense(x), list(dense.state_dict())
        classes = [type(module) for module in dense.modules()]
        attributes = [set(vars(module)) for module in dense.modules()]
        weights = [parameter.data_ptr() for parameter in dense.parameters()]

        evolved = evolve(dense)
        assert evolved is dense and type(evolved) is EvoLevit and list(evolved.state_dict()) == keys
        assert not torch.equal(evolved(x), logits)
        created = create(**kwargs)
        created.load_state_dict(evolved.state_dict())
        assert torch.equal(evolved(x), created(x))
        restored = restore(evolved)
        assert restored is dense and [type(module) for module in restored.modules()] == classes
        assert [set(vars(module)) for module in restored.modules()] == attributes
        assert [parameter.data_ptr() for parameter in restored.parameters()] == weights
        assert torch.equal(restored(x), logits)


def test_a_created_model_is_restored_to_the_dense_twin_with_its_name():
    model, dense = create(), create('levit_128s')
    dense.load_state_dict(model.state_dict())
    x = images(2, 128, 128, torch.float32)
    assert torch.equal(restore(model)(x), dense(x)) and type(model) is LevitDistilled
    assert model.pretrained_cfg['architecture'] == 'levit_128s'


def test_learned_tradeoffs_and_the_count_go_when_a_model_is_restored():
    dense = create('levit_128s')
    keys = list(dense.state_dict())
    model = evolve(dense, learn_tradeoff=True, layerwise_updates=3)
    assert {'num_updates', 'stages.1.blocks.0.attn.learn_tradeoff'} <= model.state_dict().keys() - set(keys)
    assert list(restore(model).state_dict()) == keys


@torch.no_grad()
def test_the_plain_levit_evolves():
    torch.manual_seed(0)
    dense = shake(Levit(128, **SMALL), 0.1).eval()
    x = images(2, 128, 128, torch.float32)
    logits = dense(x)
    model = evolve(dense)
    assert type(model).__name__ == 'EvoLevit' and isinstance(model, Levit)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x)) and not torch.equal(copied(x), logits)
    model.set_evolution(keep_ratio=1.0)
    torch.testing.assert_close(model(x), logits)
    assert torch.equal(restore(model)(x), logits)


def test_set_evolution_is_as_if_created_so(name):
    model = create(name)
    x = images(2, 128, 128, torch.float32)
    tradeoff = dict() if 'cls' in name else dict(tradeoff=0.2)
    settings = dict()
    for change in (
        dict(keep_ratio=0.7), dict(selection='layer'), dict(start_block=1) | tradeoff,
        dict(selection='stage', keep_ratio=[0.5, 0.4, 0.3]), dict(layerwise_updates=3),
    ):
        settings |= change
        model.set_evolution(**change)
        assert {key: model.evolution[key] for key in settings} == settings
        expected = create(name, **settings)
        expected.load_state_dict(model.state_dict())
        assert torch.equal(model(x), expected(x)), change


@pytest.mark.parametrize('arguments, error, message', [
    (dict(keep_ratio=0), ValueError, 'keep_ratio=0 is not allowed'),
    (dict(keep_ratio=0.05), ValueError, 'keep_ratio=0.05 of 16 patch tokens leaves none'),
    (dict(start_block=7), ValueError, r'start_block=7 .* 1\.\.6'),
    (dict(keep_ratios=0.5), TypeError, r'keep_ratios is not an argument of .* Did you mean keep_ratio\?'),
    (dict(class_token=True), TypeError, 'class_token cannot change at run time'),
])
def test_a_refused_change_leaves_the_model_as_it_was(name, arguments, error, message):
    model = create(name)
    x = images(2, 128, 128, torch.float32)
    logits, evolution = model(x), copy.deepcopy(model.evolution)
    with pytest.raises(error, match=message):
        model.set_evolution(**arguments)
    assert model.evolution == evolution and torch.equal(model(x), logits)


def test_a_subclass_keeps_its_own_parts():
    class WithClassHead(LevitDistilled):
        def __init__(self, **kwargs) -> None:
            super().__init__(**kwargs)
            self.head_cls = nn.Linear(3, 3)

    own = dict(img_size=64, stem_type='s8', embed_dim=(16, 24), key_dim=8, depth=(4, 3), num_heads=(2, 3))
    model = evolve(WithClassHead(**own).eval())
    model(images(2, 64, 64, torch.float32))
    assert type(restore(model).head_cls) is nn.Linear


def test_what_is_learned_is_not_set():
    model = create('evo_levit_cls_128s')
    with pytest.raises(ValueError, match=r'tradeoff=0.2 cannot be set, because learn_tradeoff=True'):
        model.set_evolution(tradeoff=0.2)
    weights = dict(model.named_parameters())
    model.set_evolution(keep_ratio=0.7)
    assert all(parameter is weights[key] for key, parameter in model.named_parameters())


def test_a_refused_model_is_left_as_it_was():
    dense = create('levit_128s')
    classes, attributes = [type(module) for module in dense.modules()], [set(vars(m)) for m in dense.modules()]
    for arguments in (dict(keep_ratio=0.05), dict(class_head=True), dict(learn_tradeoff=True, tradeoff=1.)):
        with pytest.raises(ValueError, match='not allowed|leaves none'):
            evolve(dense, **arguments)
        assert [type(module) for module in dense.modules()] == classes
        assert [set(vars(module)) for module in dense.modules()] == attributes


def test_other_refusals():
    with pytest.raises(ValueError, match='EvoLevit with class_token=True cannot be restored'):
        restore(create('evo_levit_cls_128s'))
    with pytest.raises(ValueError, match='class_token=True is not allowed'):
        evolve(create('levit_128s'), class_token=True)
    with pytest.raises(ValueError, match=r'levit_conv_128s cannot be evolved, because its projections .* levit_128s\.'):
        evolve(timm.create_model('levit_conv_128s'))
    with pytest.raises(ValueError, match='class_head=True is not allowed'):
        evolve(Levit(128, **SMALL), class_head=True)


def test_gradients_of_each_image_by_vmap():
    """Of the blocks of a stage: before them, vmap gives others than a loop in timm's dense model, too."""
    for kwargs in (dict(), dict(class_token=True), dict(fast_update=False)):
        model = build(img_size=(64, 48), depth=(4,), embed_dim=(16,), num_heads=(2,), **kwargs).eval()
        weights, x = dict(model.named_parameters()), images(3, 64, 48)

        def loss(weights: dict, image: torch.Tensor, model: nn.Module = model) -> torch.Tensor:
            return functional_call(model, weights, image.unsqueeze(0)).square().sum()

        with torch.no_grad():
            torch.testing.assert_close(
                vmap(lambda image, m=model: m(image.unsqueeze(0)))(x).squeeze(1), model(x), rtol=0, atol=1e-9)
        forget_biases(model)
        together = vmap(grad(loss), in_dims=(None, 0))(weights, x)
        for i, image in enumerate(x):
            forget_biases(model)
            for key, gradient in grad(loss)(weights, image).items():
                if key.startswith('stem'):
                    continue
                torch.testing.assert_close(together[key][i], gradient, rtol=1e-9, atol=1e-9, msg=key)


def forget_biases(model: nn.Module) -> None:
    """timm keeps the biases that it has computed in evaluation, whatever weights come later."""
    model.eval()


# Errors


@pytest.mark.parametrize('arguments, message', [
    (dict(keep_ratio=0.0), r'keep_ratio=0.0 .* \(0, 1\]'),
    (dict(keep_ratio=[0.5]), r'keep_ratio=\[0.5\] has 1 values. .* one per segment: 2'),
    (dict(keep_ratio=0.05), r'keep_ratio=0.05 of 16 patch tokens leaves none'),
    (dict(start_block=9), r'start_block=9 .* 1..8 for a model of 9 blocks'),
    (dict(selection='token'), r"selection='token' .* 'stage' or 'layer'"),
    (dict(tradeoff=2), r'tradeoff=2 .* \[0, 1\]'),
    (dict(tradeoff=[0.5] * 9), r'tradeoff=.* has 9 values. .* one per attention: 11'),
    (dict(learn_tradeoff=True, tradeoff=1.0), r'tradeoff=1.0 .* \(0, 1\)'),
    (dict(learn_tradeoff=True, fast_update=False), r'learn_tradeoff=True .* fast_update=False'),
    (dict(class_head=True), r'class_head=True .* class_token=True'),
    (dict(class_token='false'), r"class_token='false' .* True or False"),
    (dict(use_conv=True), r'convolutions \(use_conv=True\), .* linear LeViT, levit_\*'),
    (dict(img_size=230), r'img_size=\(230, 230\) .* multiples of 16'),
    (dict(img_size=(224, 200)), r'img_size=\(224, 200\) .* multiples of 16'),
])
def test_argument_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('evo_levit_128s', **arguments)


def test_no_weights_of_the_published_architecture():
    with pytest.raises(RuntimeError, match='evo_levit_cls_256, .*no weights .*timm-evo convert'):
        timm.create_model('evo_levit_cls_256', pretrained=True)


def test_an_image_of_another_size_is_refused(name):
    for height, width in ((96, 128), (144, 128), (128, 64)):
        with pytest.raises(AssertionError, match='128'):
            create(name)(images(1, height, width, torch.float32))
