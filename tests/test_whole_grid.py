"""`timm_evo.whole_grid`: values of hooks between blocks, spread to all patches, for every selection and family."""
import copy
import pickle

import pytest
import small_vits
import test_levit
import timm
import torch
from test_method import KINDS, build
from torch import Tensor, nn

import timm_evo

SELECTIONS = {
    'similarity': dict(selection='similarity', keep_ratio=0.6),
    'stage': dict(selection='stage', keep_ratio=[0.6, 0.4], start_block=2, stage_depth=3),
    'layer': dict(selection='layer', keep_ratio=0.5, start_block=3),
    'stage, preserved': dict(selection='stage', keep_ratio=0.5, fast_update=False),
}
EACH_SELECTION = pytest.mark.parametrize('settings', SELECTIONS.values(), ids=SELECTIONS)
PARTS = ('norm1', 'attn', 'mlp')


def watch(model: nn.Module, modules: dict, take) -> dict:
    """Hooks on modules, that keep what `take` makes of an output."""
    seen = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: take(out)}))
    return seen


def small(kind: str, **settings) -> nn.Module:
    if kind in KINDS:
        return build(**KINDS[kind], **settings).eval()
    return small_vits.create(kind, **settings).double()


def images_of(model: nn.Module, batch_size: int = 3) -> Tensor:
    return small_vits.images(model, batch_size).double()


def open_selection(selections: list[timm_evo.Selection], block: int) -> timm_evo.Selection | None:
    return next((selection for selection in reversed(selections) if selection.block <= block), None)


@pytest.mark.parametrize('kind', [
    'class token', 'no class token', 'registers', 'distilled', 'evo_vit_small_patch16_dinov3',
    'evo_eva02_tiny_patch14_224'])
@EACH_SELECTION
@torch.no_grad()
def test_each_token_has_the_value_of_the_one_that_it_is_or_follows(kind, settings):
    model = small(kind, **settings)
    x, num_prefix_tokens = images_of(model), model.num_prefix_tokens
    selections = timm_evo.trace(model, x)
    with timm_evo.whole_grid(model) as grid:
        seen = watch(model, dict(enumerate(model.blocks)), lambda out: (out, grid.tokens(out)))
        model(x)
        present_and_whole = dict(seen)
        maps = model.forward_intermediates(x, output_fmt='NLC', intermediates_only=True)
    assert len(selections) >= 2
    for block, patches in enumerate(maps):
        present, whole = present_and_whole[block]
        assert torch.equal(whole[:, :num_prefix_tokens], present[:, :num_prefix_tokens])
        selection = open_selection(selections, block)
        if selection is None:
            assert torch.equal(whole, present)
            continue
        slow, follows, whole = selection.slow.flatten(1), selection.follows.flatten(1), whole[:, num_prefix_tokens:]
        if settings['selection'] == 'similarity':
            # those that are left are in the order of the grid
            assert torch.equal(whole[slow], present[:, num_prefix_tokens:].flatten(0, 1))
            assert torch.equal(whole, whole.take_along_dim(follows.unsqueeze(2), dim=1))
            alone = torch.stack([torch.bincount(f, minlength=f.numel())[f] == 1 for f in follows])
            assert alone.any() and not alone.all()
            torch.testing.assert_close(whole[alone], patches[alone], rtol=0, atol=1e-12)
        else:
            assert torch.equal(whole[slow], patches[slow])
            last = present[:, -1:] if model.evolution['fast_update'] else torch.zeros_like(present[:, -1:])
            assert torch.equal(whole[~slow], last.expand_as(whole)[~slow])


def levit(scheme: str, **settings) -> nn.Module:
    return test_levit.build(**test_levit.SCHEMES[scheme], **settings).eval()


@pytest.mark.parametrize('scheme', test_levit.SCHEMES)
@pytest.mark.parametrize('settings', [
    dict(keep_ratio=0.5), dict(keep_ratio=0.7, selection='layer'), dict(fast_update=False, start_block=1)])
@torch.no_grad()
def test_a_levit_has_a_smaller_grid_in_each_stage(scheme, settings):
    model = levit(scheme, **settings)
    x, num_prefix_tokens = test_levit.images(), model.num_prefix_tokens
    selections = timm_evo.trace(model, x)
    blocks = [block for stage in model.stages for block in stage.blocks]
    with timm_evo.whole_grid(model) as grid:
        seen = watch(model, dict(enumerate(blocks)), lambda out: out[0])
        of_stages = watch(model, dict(enumerate(model.stages)), lambda out: out[0])
        model(x)
        whole_of = {block: grid.tokens(out, block) for block, out in seen.items()}
    block = -1
    for stage, number in enumerate((48, 12, 4)):
        for _ in model.stages[stage].blocks:
            block += 1
            whole = whole_of[block]
            assert whole.shape[1] == num_prefix_tokens + number
            selection = open_selection(selections, block)
            if selection is None or selection.slow[0].numel() != number:
                assert whole is seen[block]
                continue
            slow = selection.slow.flatten(1)
            last = seen[block][:, -1:] if model.evolution['fast_update'] else torch.zeros_like(seen[block][:, -1:])
            patches = whole[:, num_prefix_tokens:]
            assert torch.equal(patches[~slow], last.expand_as(patches)[~slow])
            for image in range(len(x)):  # each of the tokens present once
                chosen = patches[image][slow[image]]
                present = seen[block][image, num_prefix_tokens:num_prefix_tokens + len(chosen)]
                assert torch.equal(chosen.sort(dim=0).values, present.sort(dim=0).values)
        after = of_stages[stage]
        assert torch.equal(whole[:, :num_prefix_tokens], after[:, :num_prefix_tokens])
        if selection is not None and selection.slow[0].numel() == number:
            assert torch.equal(whole[:, num_prefix_tokens:][slow], after[:, num_prefix_tokens:][slow])


@pytest.mark.parametrize('kind', ['class token', 'no class token', 'distilled', 'evo_vit_small_patch16_dinov3'])
@EACH_SELECTION
def test_gradients_are_shared_among_tokens_that_are_one(kind, settings):
    model = small(kind, **settings)
    x = images_of(model)
    selections = timm_evo.trace(model, x)
    seen = {}
    with timm_evo.whole_grid(model) as grid:
        for block, module in enumerate(model.blocks):
            module.mlp.register_forward_hook(
                lambda module, args, out, block=block: seen.update({block: out.retain_grad() or out}))
        model(x).square().sum().backward()
        whole_of = {block: grid.gradients(out.grad, block) for block, out in seen.items()}
    for block, out in seen.items():
        whole = whole_of[block]
        torch.testing.assert_close(whole.sum(dim=1), out.grad.sum(dim=1), rtol=1e-9, atol=1e-12)
        selection = open_selection(selections, block)
        if selection is None:
            continue
        for image, follows in enumerate(selection.follows.flatten(1)):
            patches = whole[image, model.num_prefix_tokens:]
            for leader in follows.unique().tolist():
                group = patches[follows == leader]
                assert torch.equal(group, group[:1].expand_as(group))
                if leader == -2:
                    assert not group.any()


@pytest.mark.parametrize('kind', ['class token', 'no class token', 'registers'])
@EACH_SELECTION
@torch.no_grad()
def test_attention_maps_gather_from_all_tokens_what_they_gathered_from_those_present(kind, settings):
    model = small(kind, **settings)
    for block in model.blocks:
        block.attn.fused_attn = False
    generator = torch.Generator().manual_seed(0)
    with timm_evo.whole_grid(model) as grid:
        def take(maps):
            number = torch.arange(1., 1 + maps.shape[2]).expand(len(maps), -1).unsqueeze(2)
            values = torch.randn(*maps.shape[:3], 2, dtype=maps.dtype, generator=generator)
            return grid.attention(maps), grid.tokens(number)[:, :, 0], grid.tokens(values), grid.tokens(maps @ values)

        seen = watch(model, {i: block.attn.attn_drop for i, block in enumerate(model.blocks)}, take)
        model(images_of(model))
    assert len(seen) == len(model.blocks)
    for maps, number, values, gathered in seen.values():
        assert maps.shape[2:] == (36 + model.num_prefix_tokens,) * 2
        follows_nothing = (number == 0).unsqueeze(1)
        looks_at_itself = torch.eye(maps.shape[2], dtype=torch.bool) & follows_nothing.unsqueeze(3)
        assert (maps[looks_at_itself.expand_as(maps)] == 1).all()
        maps_of_others = maps.masked_fill(follows_nothing.unsqueeze(3), 0)
        torch.testing.assert_close(maps.sum(dim=3), torch.ones_like(maps[..., 0]), rtol=0, atol=1e-12)
        torch.testing.assert_close(maps_of_others @ values, gathered, rtol=0, atol=1e-9)
        for image, numbers in enumerate(number):
            for one in numbers.unique().tolist():
                columns = maps_of_others[image][:, :, numbers == one]
                assert torch.equal(columns, columns[:, :, :1].expand_as(columns))


# Grad-CAM


class Cam:
    """Grad-CAM as in its library: hooks call one function for activations and gradients."""

    def __init__(self, model: nn.Module, layers: list[nn.Module], reshape_transform) -> None:
        self.model, self.reshape_transform = model, reshape_transform
        self.handles = [layer.register_forward_hook(self.hook) for layer in layers]

    def hook(self, module, args, out) -> None:
        self.activations.append(self.reshape_transform(out).detach())
        if out.requires_grad:
            out.register_hook(lambda grad: self.gradients.insert(0, self.reshape_transform(grad).detach()))

    def __call__(self, x: Tensor, target: int = 3, num_backward: int = 1) -> list[Tensor]:
        self.activations, self.gradients = [], []
        out = self.model(x)
        for _ in range(num_backward):
            self.gradients = []
            out[:, target].sum().backward(retain_graph=True)
        return [
            (activation * gradient.mean(dim=(2, 3), keepdim=True)).sum(dim=1)
            for activation, gradient in zip(self.activations, self.gradients, strict=True)]


def layers_of(model: nn.Module) -> dict[tuple[int, str], nn.Module]:
    return {(i, part): model.blocks[i].get_submodule(part) for i in (0, 2, len(model.blocks) - 1) for part in PARTS}


@pytest.mark.parametrize('kind', ['class token', 'no class token', 'registers', 'evo_eva02_tiny_patch14_224'])
@EACH_SELECTION
def test_grad_cam_takes_one_function_for_activations_and_gradients(kind, settings):
    model = small(kind, **settings)
    layers = layers_of(model)
    seen = {}

    def watch_both(name):
        return lambda module, args, out: seen.update({name: out.retain_grad() or out})

    with timm_evo.whole_grid(model) as grid:
        cam = Cam(model, list(layers.values()), grid.reshape_transform)
        for name, layer in layers.items():
            layer.register_forward_hook(watch_both(name))
        for batch_size, num_backward in ((3, 1), (2, 2), (2, 1)):  # anew in each pass
            x = images_of(model, batch_size)
            maps = cam(x, num_backward=num_backward)
            model(x)[:, 3].sum().backward()
            for found, ((block, _), out) in zip(maps, seen.items(), strict=True):
                activation, gradient = grid.tokens(out, block), grid.gradients(out.grad, block)
                weights = gradient[:, model.num_prefix_tokens:].mean(dim=1, keepdim=True)
                expected = (activation[:, model.num_prefix_tokens:] * weights).sum(dim=2).view(batch_size, 6, 6)
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize('settings', [dict(selection='similarity'), dict(selection='stage'), dict(fast_update=True)])
def test_keep_ratio_one_is_the_dense_model(settings):
    model = build(keep_ratio=1., **settings).eval()
    dense = timm_evo.restore(copy.deepcopy(model))
    seen_dense = watch(dense, layers_of(dense), lambda out: out.detach())
    with timm_evo.whole_grid(model) as grid:
        maps = Cam(model, list(layers_of(model).values()), grid.reshape_transform)(images_of(model))
        seen = watch(model, layers_of(model), lambda out: grid.tokens(out.detach()))
        model(images_of(model))
    as_grid = Cam(dense, list(layers_of(dense).values()), lambda x: x[:, 1:].transpose(1, 2).unflatten(2, (6, 6)))
    for found, expected in zip(maps, as_grid(images_of(model)), strict=True):
        assert torch.equal(found, expected)
    for name, out in seen.items():
        assert torch.equal(out, seen_dense[name])


def test_grad_cam_of_a_levit():
    model = levit('class token', keep_ratio=0.6)
    layers = [model.stages[0].blocks[0].mlp, model.stages[1].blocks[1].mlp, model.stages[2].blocks[1].attn.proj]
    with timm_evo.whole_grid(model) as grid:
        maps = Cam(model, layers, grid.reshape_transform)(test_levit.images())
    assert [tuple(found.shape[1:]) for found in maps] == [(8, 6), (4, 3), (2, 2)]


@EACH_SELECTION
def test_the_library_for_grad_cam(settings):
    pytorch_grad_cam = pytest.importorskip('pytorch_grad_cam')
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    model = build(**settings).eval().float()
    layers, x = [model.blocks[2].norm1, model.blocks[-1].norm1], images_of(model, 2).float()
    with timm_evo.whole_grid(model) as grid:
        with pytorch_grad_cam.GradCAM(model, layers, reshape_transform=grid.reshape_transform) as cam:
            found = cam(x, targets=[ClassifierOutputTarget(3)] * 2)
        assert found.shape == (2, 24, 24) and found.max() > 0.9
        own = Cam(model, layers, grid.reshape_transform)(x)
    maps = [map_.clamp(min=0).numpy() for map_ in own]
    expected = [
        torch.from_numpy(pytorch_grad_cam.utils.image.scale_cam_image(map_, (24, 24))) for map_ in maps]
    mean = torch.stack(expected).mean(dim=0).numpy()
    expected = pytorch_grad_cam.utils.image.scale_cam_image(mean)
    torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected), rtol=0, atol=1e-4)


# What it does to a model


def state_of(model: nn.Module) -> tuple:
    return [type(module) for module in model.modules()], [sorted(vars(module)) for module in model.modules()]


def build_any(family: str) -> tuple[nn.Module, Tensor]:
    if family == 'levit':
        return levit('biases'), test_levit.images()
    model = build(selection=family).eval()
    return model, images_of(model)


EACH_FAMILY = pytest.mark.parametrize('family', ['levit', 'similarity', 'stage'])


@EACH_FAMILY
def test_a_model_computes_the_same_and_is_as_it_was_afterwards(family):
    model, x = build_any(family)
    before, text, logits = state_of(model), repr(model), model(x)
    with pytest.raises(ZeroDivisionError), timm_evo.whole_grid(model):
        assert torch.equal(model(x), logits)
        assert repr(model) == text
        raise ZeroDivisionError
    assert state_of(model) == before and torch.equal(model(x), logits)


@EACH_FAMILY
@torch.no_grad()
def test_copies_and_traces_are_not_recorded(family):
    model, x = build_any(family)
    other = torch.randn_like(x)
    seen, classes = [], [type(module) for module in model.modules()]
    layer = (model.stages[-1] if family == 'levit' else model).blocks[-1].mlp
    with timm_evo.whole_grid(model) as grid:
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        handle = layer.register_forward_hook(lambda module, args, out: seen.append(out))
        model(x)
        expected = grid.tokens(seen[0], 6)
        for copied in copies:
            assert [type(module) for module in copied.modules()] == classes
            copied(other)
        timm_evo.trace(model, other)
        assert torch.equal(grid.tokens(seen[0], 6), expected)
    handle.remove()


def test_grids_within_each_other():
    model, x = build_any('similarity')
    with timm_evo.whole_grid(model) as outer, timm_evo.whole_grid(model) as inner:
        seen = watch(model, {'last': model.blocks[-1]}, lambda out: (outer.tokens(out), inner.tokens(out)))
        model(x)
    assert torch.equal(*seen['last'])


def test_grids_that_overlap():
    model, x = build_any('similarity')
    first, second = timm_evo.whole_grid(model), timm_evo.whole_grid(model)
    first.__enter__()
    grid = second.__enter__()
    first.__exit__(None, None, None)
    seen = watch(model, {'last': model.blocks[-1]}, grid.tokens)
    model(x[:1])
    assert seen['last'].shape == (1, 37, 24)
    second.__exit__(None, None, None)
    assert vars(model).keys() == vars(build_any('similarity')[0]).keys()


@pytest.mark.parametrize('family', ['similarity', 'levit'])
def test_a_shallow_copy_is_not_recorded(family):
    model, x = build_any(family)
    layer = (model.stages[1] if family == 'levit' else model).blocks[-1]
    with timm_evo.whole_grid(model) as grid:
        twin = copy.copy(model)
        seen = watch(model, {'last': layer}, lambda out: out[0] if isinstance(out, tuple) else out)
        model(x)
        tokens = seen['last']
        if family != 'levit':  # a shallow copy of a LeViT has the same stages
            twin(x[:1])
        assert len(grid.tokens(tokens)) == len(x)


def test_arguments_of_evolution_and_images_may_change_within_the_context():
    model = timm.create_model('evo_test_vit', dynamic_img_size=True).eval()
    with timm_evo.whole_grid(model) as grid:
        seen = watch(model, {'last': model.blocks[-1].norm1}, grid.reshape_transform)
        for size, grid_size in (((160, 160), (10, 10)), ((96, 128), (6, 8))):
            for settings in (dict(selection='similarity'), dict(selection='stage'), dict(keep_ratio=1.)):
                model.set_evolution(**settings)
                model(torch.randn(2, 3, *size))
                assert seen['last'].shape[2:] == grid_size
            model.set_evolution(keep_ratio=0.5)


def test_through_wrappers():
    model, x = build_any('similarity')
    with timm_evo.whole_grid(nn.Sequential(nn.Identity(), model)) as grid:
        seen = watch(model, {'last': model.blocks[-1]}, grid.tokens)
        nn.Sequential(model)(x)
    assert seen['last'].shape == (3, 37, 24)


@pytest.mark.parametrize('family', ['levit', 'stage'])
def test_gradients_through_checkpoints(family):
    model, x = build_any(family)
    model.train()  # in evaluation LeViT keeps its biases
    layer = (model.stages[1] if family == 'levit' else model).blocks[-1].mlp
    whole = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        gradients = []
        with timm_evo.whole_grid(model) as grid:
            handle = layer.register_full_backward_hook(lambda module, args, out, to=gradients: to.append(out[0]))
            model(x).square().sum().backward()
            handle.remove()
            whole.append(grid.gradients(gradients[0], None if family == 'levit' else 6))
    torch.testing.assert_close(*whole, rtol=1e-9, atol=1e-12)


# What it refuses


def test_a_value_that_could_be_from_several_blocks_says_which():
    model, x = build_any('stage')  # blocks 2 to 6
    model.set_evolution(keep_ratio=0.5, start_block=1, stage_depth=3)
    with timm_evo.whole_grid(model) as grid:
        within = watch(model, dict(enumerate(model.blocks)), lambda out: (out, grid.tokens(out)))
        model(x)
        for block, (out, whole) in within.items():
            assert torch.equal(grid.tokens(out, block), whole)
        assert not torch.equal(grid.tokens(within[1][0], 4), within[1][1])
        with pytest.raises(ValueError, match='block=None is not clear. Give the block that x is from: tokens of each '
                                             'of 3 images: 37 from block 0 on, 20 from block 1 on, 20 from block 4 on'):
            grid.tokens(within[1][0])
        with pytest.raises(ValueError, match='block=-1 is not allowed'):
            grid.tokens(within[1][0], -1)


def test_a_selection_may_have_as_many_tokens_as_the_whole_sequence():
    model = build(selection='stage', keep_ratio=0.99, start_block=2, stage_depth=5).eval()
    with timm_evo.whole_grid(model) as grid:
        seen = watch(model, dict(enumerate(model.blocks)), lambda out: (out, grid.tokens(out)))
        model(images_of(model))
        assert all(torch.equal(*seen[block]) for block in (0, 1))
        assert all(not torch.equal(*seen[block]) for block in (2, 6))
        assert all(torch.equal(grid.tokens(out, block), whole) for block, (out, whole) in seen.items())
        with pytest.raises(ValueError, match='block=None is not clear'):
            grid.tokens(seen[6][0])


def test_values_from_elsewhere_are_refused():
    model, x = build_any('similarity')
    with timm_evo.whole_grid(model) as grid:
        with pytest.raises(RuntimeError, match='no forward pass to read'):
            grid.tokens(torch.zeros(3, 20, 24))
        model(x)
        with pytest.raises(ValueError, match=r'x of shape \(3, 11, 24\) is not from the last forward pass: tokens of'):
            grid.tokens(torch.zeros(3, 11, 24))
        with pytest.raises(ValueError, match=r'x of shape \(3, 37, 24\) is not from block 5 or later ones'):
            grid.gradients(torch.zeros(3, 37, 24), 6)
        with pytest.raises(ValueError, match=r'Attention maps must be of shape \(B, H, L, L\)'):
            grid.attention(torch.zeros(3, 37, 37))
        with pytest.raises(TypeError, match='x must be a tensor, not a tuple'):
            grid.tokens((torch.zeros(3, 37, 24), None))
    with pytest.raises(RuntimeError, match='no forward pass to read'):  # a later one would not be recorded
        grid.tokens(torch.zeros(3, 37, 24))
    with pytest.raises(TypeError, match='VisionTransformer is not evolved, so hooks already get the whole grid'):
        with timm_evo.whole_grid(timm.create_model('test_vit')):
            pass


def test_patches_that_are_dropped_in_training_are_no_grid():
    model = build(patch_drop_rate=0.5)
    with timm_evo.whole_grid(model):
        with pytest.raises(RuntimeError, match='patch_drop_rate=0'):
            model(images_of(model))
        model.eval()(images_of(model))


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'levit_128s'])
def test_a_model_may_be_restored_while_it_is_recorded(name):
    dense = timm.create_model(name, **{} if 'levit' in name else dict(img_size=48, patch_size=8, depth=4)).eval()
    classes = [type(module) for module in dense.modules()]
    with timm_evo.whole_grid(timm_evo.evolve(dense)):
        timm_evo.restore(dense)
    assert [type(module) for module in dense.modules()] == classes
