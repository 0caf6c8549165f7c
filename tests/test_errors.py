"""Bad input is refused before any work, by a message that names the argument, the value and what is allowed."""
import warnings

import pytest
import timm
import torch
from timm.models import _builder
from timm.models.vision_transformer import Block
from torch import nn

from timm_evo import EvoVisionTransformer, evolve

NAME = 'evo_deit_tiny_patch16_224'


@pytest.mark.parametrize('arguments, message', [
    (dict(keep_ratio=0.0), r'keep_ratio=0.0 .* \(0, 1\]'),
    (dict(keep_ratio=1.5), r'keep_ratio=1.5 .* \(0, 1\]'),
    (dict(keep_ratio=-0.5), r'keep_ratio=-0.5 .* \(0, 1\]'),
    (dict(keep_ratio=float('nan')), r'keep_ratio=nan .* \(0, 1\]'),
    (dict(keep_ratio='half'), r"keep_ratio='half' .* \(0, 1\]"),
    (dict(keep_ratio=True), r'keep_ratio=True .* \(0, 1\]'),
    (dict(keep_ratio=(0.5, 0.0)), r'keep_ratio=0.0 .* \(0, 1\]'),
    (dict(keep_ratio=(0.5, 0.5, 0.5)), r'keep_ratio=\(0.5, 0.5, 0.5\) has 3 values. .* one per segment: 2'),
    (dict(keep_ratio=[0.5], selection='layer'), r'keep_ratio=\[0.5\] has 1 values. .* one per segment: 8'),
    (dict(start_block=12), r'start_block=12 .* 1..11 for a model of 12 blocks'),
    (dict(start_block=0), r'start_block=0 .* 1..11'),
    (dict(start_block=1.5), r'start_block=1.5 .* 1..11'),
    (dict(start_block=True), r'start_block=True .* 1..11'),
    (dict(stage_depth=0), r'stage_depth=0 .* at least 1'),
    (dict(stage_depth=True), r'stage_depth=True .* at least 1'),
    (dict(fast_update='false'), r"fast_update='false' .* True or False"),
    (dict(class_head='true', global_pool='avg'), r"class_head='true' .* True or False"),
    (dict(selection='token'), r"selection='token' .* 'stage', 'layer' or 'similarity'"),
    (dict(tradeoff=1.1), r'tradeoff=1.1 .* \[0, 1\]'),
    (dict(tradeoff=-0.1), r'tradeoff=-0.1 .* \[0, 1\]'),
    (dict(tradeoff=[0.5] * 11), r'tradeoff=.* has 11 values. .* one per block: 12'),
    (dict(keep_ratio=0.005), r'keep_ratio=0.005 of 196 patch tokens leaves none'),
    (dict(class_head=True), r"class_head=True .* global_pool='token' .* needs global_pool='avg'"),
])
def test_argument_out_of_range(arguments, message):
    small = dict(embed_dim=24, num_heads=2)  # what is refused is found when the dense model is there
    with pytest.raises(ValueError, match=message):
        timm.create_model(NAME, **small | arguments)
    with pytest.raises(ValueError, match=message):
        EvoVisionTransformer(**small | dict(selection='stage') | arguments)


def test_class_head_of_a_distilled_model():
    with pytest.raises(ValueError, match='class_head=True'):
        timm.create_model('evo_deit_tiny_distilled_patch16_224', class_head=True)


def test_class_head_without_class_token():
    with pytest.raises(ValueError, match='class_head=True .* class token'):
        EvoVisionTransformer(class_token=False, global_pool='avg', class_head=True)


def test_unknown_argument():
    with pytest.raises(TypeError, match=r'keep_ration is not an argument of .* Did you mean keep_ratio\?'):
        timm.create_model(NAME, keep_ration=0.5)


def test_distilled_training_without_a_second_head():
    with pytest.raises(ValueError, match='class_head=True'):
        timm.create_model(NAME).set_distilled_training(True)


def test_an_image_too_small_to_select_from():
    model = timm.create_model('evo_test_vit', selection='stage', keep_ratio=0.1)
    with pytest.raises(ValueError, match='keep_ratio=0.1 of 4 patch tokens leaves none'):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match='keep_ratio=0.1 of 4 patch tokens leaves none'):
        model.set_input_size(img_size=(32, 32))


@pytest.mark.parametrize('mask', [dict(attn_mask=torch.ones(197, 197)), dict(is_causal=True)])
def test_attention_masks(mask):
    model = timm.create_model(NAME)
    with pytest.raises(ValueError, match='attn_mask must be None'):
        model.forward_features(torch.randn(1, 3, 224, 224), **mask)


class OwnBlock(nn.Linear):
    """A block of a user's class."""

    def __init__(self, dim: int, **kwargs) -> None:
        super().__init__(dim, dim)


def test_blocks_that_cannot_be_evolved_are_named():
    with pytest.raises(TypeError, match='OwnBlock cannot be evolved, because .* from timm.s Attention in a Block, '):
        EvoVisionTransformer(depth=2, start_block=1, block_fn=OwnBlock)


def test_attentions_that_cannot_be_evolved_are_named():
    if 'vit_dwee_patch16_reg1_gap_256' not in timm.list_models():
        pytest.skip(f'timm {timm.__version__} has no differential attention')
    for name, message in {
        'vit_dwee_patch16_reg1_gap_256': 'Block with DiffAttention cannot be evolved',
        'vit_dpwee_patch16_reg1_gap_256': 'DiffParallelScalingBlock cannot be evolved',
    }.items():
        with pytest.raises(TypeError, match=message):
            evolve(timm.create_model(name, depth=2))


def test_models_that_cannot_be_evolved_are_named_and_left_alone():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match='Linear cannot be evolved, because it has no attention'):
        evolve(model)
    dense = timm.create_model('test_vit')
    with pytest.raises(ValueError, match='start_block=6'):
        evolve(dense, start_block=6)
    assert type(dense) is timm.models.VisionTransformer


def test_a_single_block_has_nothing_to_select_by():
    with pytest.raises(ValueError, match='A model of 1 block cannot be evolved'):
        EvoVisionTransformer(depth=1)


def test_an_image_too_small_is_found_where_no_size_was_given():
    dense = timm.models.VisionTransformer(
        img_size=None, pos_embed='none', no_embed_class=True, class_token=False, global_pool='avg',
        embed_dim=24, depth=4, num_heads=2)
    model = evolve(dense, selection='stage', keep_ratio=0.2)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    model.set_input_size(patch_size=16)
    with pytest.raises(ValueError, match='keep_ratio=0.2 of 4 patch tokens leaves none'):
        model(torch.randn(1, 3, 32, 32))


def test_weights_that_do_not_exist():
    with pytest.raises((RuntimeError, AssertionError)):
        timm.create_model(f'{NAME}.no_such_tag')
    with pytest.raises(RuntimeError):
        timm.create_model('evo_deit_small_patch16_384', pretrained=True)


def test_a_refused_input_size_leaves_the_model_as_it_was():
    model = timm.create_model(NAME, img_size=64, keep_ratio=0.1)
    with pytest.raises(ValueError, match='keep_ratio=0.1 of 4 patch tokens'):
        model.set_input_size(img_size=32)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


class BlockWithoutMask(Block):
    """A block as in an old copy of timm's code."""

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


def test_a_block_that_takes_no_mask_cannot_count_tokens():
    message = r"BlockWithoutMask .* its forward takes no attn_mask\..* selection='stage' or 'layer'"
    small = dict(img_size=48, patch_size=8, embed_dim=48, num_heads=3, depth=6)
    model = timm.create_model('vit_tiny_patch16_224', block_fn=BlockWithoutMask, **small)
    with pytest.raises(TypeError, match=message):
        evolve(model)
    assert type(model) is timm.models.VisionTransformer
    images = torch.randn(2, 3, 48, 48)
    evolve(model, selection='stage')(images)
    with pytest.raises(TypeError, match=message):
        model.set_evolution(selection='similarity', stage_depth=None)
    model(images)

    model = evolve(timm.create_model('vit_tiny_patch16_224', **small))
    model.blocks[4] = BlockWithoutMask(48, 3)
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        with pytest.raises(TypeError, match=message):
            model(images)


def test_an_error_within_a_block_is_its_own():
    model = timm.create_model('evo_vit_tiny_patch16_224', img_size=48, patch_size=8, embed_dim=48, num_heads=3, depth=6)
    model.blocks[4].mlp.forward = lambda x: x + 'text'
    with pytest.raises(TypeError, match='unsupported operand'):
        model(torch.randn(2, 3, 48, 48))


# Dense weights in a published selection


@pytest.fixture
def without_weights(monkeypatch):
    """Weights count as loaded."""
    monkeypatch.setattr(_builder, 'load_pretrained', lambda *args, **kwargs: None)


SMALL = dict(embed_dim=24, depth=4, num_heads=2)


@pytest.mark.parametrize('name, arguments', [
    (NAME, dict()),
    (f'{NAME}.fb_in1k', dict(selection='layer', keep_ratio=[1.0, 1.0, 0.6])),
    ('evo_vit_tiny_patch16_224', dict(selection='stage')),
    (NAME, dict(features_only=True)),
    (NAME, dict(num_classes=10)),
])
def test_dense_weights_in_a_published_selection_are_warned_of(name, arguments, without_weights):
    model_name = name.partition('.')[0]
    with pytest.warns(UserWarning, match=f"{model_name} has timm's dense .* selection='similarity'") as caught:
        timm.create_model(name, pretrained=True, **SMALL | arguments)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_it_is_warned_once_by_default(without_weights):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')
        for _ in range(3):
            timm.create_model(NAME, pretrained=True, **SMALL)
    assert len(caught) == 1


@pytest.mark.parametrize('name, arguments', [
    (NAME, dict(selection='similarity')),
    ('evo_vit_tiny_patch16_224', dict()),
    (NAME, dict(keep_ratio=1.0)),
    (NAME, dict(pretrained=False)),
    (NAME, dict(pretrained_cfg_overlay=dict(file='weights.safetensors'))),
    (NAME, dict(pretrained_cfg_overlay=dict(state_dict={'head.bias': torch.zeros(1)}))),
    (NAME, dict(pretrained_cfg_overlay=dict(hf_hub_id='somebody/evolved'))),
    (NAME, dict(pretrained_cfg=dict(hf_hub_id='somebody/evolved', source='hf-hub', architecture=NAME))),
    (NAME, dict(pretrained_cfg=dict(file='folder', source='local-dir', architecture=NAME))),
    ('evo_levit_128s', dict()),  # similarity is not for it
])
def test_other_weights_or_selections_are_not_warned_of(name, arguments, without_weights):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        small = {} if 'levit' in name else SMALL
        timm.create_model(name, **dict(pretrained=True) | small | arguments)
