"""The patch embedding as one product, without a visible difference. On a CPU the environment turns it on."""
import pytest
import timm
import torch
from small_vits import create, images
from torch import Tensor, nn

from timm_evo.models import patch_embedding

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def products(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the images that were embedded by a product."""
    monkeypatch.setenv('TIMM_EVO_KERNELS', '1')
    seen = []
    embed_by_product = patch_embedding.embed_by_product

    def spy(embed, x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return embed_by_product(embed, x)

    monkeypatch.setattr(patch_embedding, 'embed_by_product', spy)
    return seen


@pytest.mark.parametrize('name, settings', [
    ('evo_deit_tiny_patch16_224', {}),
    ('evo_vit_base_patch32_clip_224', {}),  # has no bias
    ('evo_vit_small_patch16_dinov3', {}),  # keeps the grid
    ('evo_deit_tiny_patch16_224', dict(dynamic_img_size=True)),
    ('evo_deit_tiny_patch16_224', dict(patch_size=(8, 4), img_size=(24, 16))),
])
@torch.no_grad()
def test_equals_the_convolution(name, settings, products):
    model = create(name, **settings).to(BF16)
    x = images(model).to(BF16)
    for layout in (x, x.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(model._embed_patches(layout), model.patch_embed(layout), rtol=2e-2, atol=2e-2)
    assert products == [tuple(x.shape)] * 2


def test_equals_the_convolution_to_float64(products):
    embed = create('evo_deit_tiny_patch16_224').double().patch_embed
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    by_product, by_convolution = patch_embedding.embed_by_product(embed, x), embed(x)
    torch.testing.assert_close(by_product, by_convolution, rtol=0, atol=1e-12)
    for ours, theirs in zip(*(
            torch.autograd.grad(out.square().sum(), list(embed.parameters())) for out in (by_product, by_convolution)),
            strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_autocast(products):
    model = create('evo_deit_tiny_patch16_224')
    with torch.autocast('cpu', BF16):
        assert model._embed_patches(images(model)).dtype == BF16
    assert len(products) == 1


def watched(model: nn.Module) -> nn.Module:
    model.patch_embed.proj.register_forward_hook(lambda *args: None)
    return model


def replaced(model: nn.Module) -> nn.Module:
    model.patch_embed.proj = type('Own', (nn.Conv2d,), {})(3, 48, 8, 8)
    return model


def parametrized(model: nn.Module) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.patch_embed.proj)
    return model


def overlapping(model: nn.Module) -> nn.Module:
    model.patch_embed.proj.padding = (1, 1)
    return model


@pytest.mark.parametrize('change', [watched, replaced, parametrized, overlapping])
@torch.no_grad()
def test_with_hooks_or_changes_the_convolution_is_used(change, products):
    model = change(create('evo_deit_tiny_patch16_224')).to(BF16)
    model.patch_embed(images(model).to(BF16))
    model._embed_patches(images(model).to(BF16))
    assert not products


@torch.no_grad()
def test_with_other_dtypes_and_devices_the_convolution_is_used(products, monkeypatch):
    model = create('evo_deit_tiny_patch16_224')
    model._embed_patches(images(model))  # float32, in which a product is rounded in another way
    monkeypatch.delenv('TIMM_EVO_KERNELS')
    model.to(BF16)._embed_patches(images(model).to(BF16))  # a CPU
    assert not products


def test_images_of_a_wrong_size_are_refused_as_by_timm():
    model, dense = create('evo_deit_tiny_patch16_224').to(BF16), create('deit_tiny_patch16_224').to(BF16)
    messages = []
    for each in (model, dense):
        with pytest.raises(AssertionError) as error:
            each(torch.zeros(1, 3, 40, 48, dtype=BF16))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@torch.no_grad()
def test_images_that_are_padded(products):
    model = create('evo_deit_tiny_patch16_224', dynamic_img_size=True, dynamic_img_pad=True).to(BF16)
    x = torch.randn(1, 3, 42, 50, dtype=BF16)
    assert torch.equal(model._embed_patches(x), model.patch_embed(x))


def test_the_dense_model_is_left_alone(products):
    timm.create_model('test_vit').to(BF16)(torch.zeros(1, 3, 160, 160, dtype=BF16))
    assert not products
