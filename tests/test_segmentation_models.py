"""As a backbone of segmentation_models_pytorch, which builds on timm and knows nothing of token evolution."""
import pytest
import torch

smp = pytest.importorskip('segmentation_models_pytorch')


def create(encoder: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return smp.DPT(
        f'tu-{encoder}', encoder_weights=None, classes=3,
        decoder_intermediate_channels=(8,) * 4, decoder_fusion_channels=8).eval()


@pytest.mark.parametrize('encoder', ['vit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224'])
def test_a_decoder_over_feature_maps_of_an_evolved_vit(encoder):
    model, dense = create(f'evo_{encoder}'), create(encoder)
    dense.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    masks = model(images)
    assert masks.shape == (2, 3, 224, 224) and not torch.allclose(masks, dense(images), atol=1e-5)
    masks.square().mean().backward()
    assert all(p.grad is not None for p in model.encoder.model.blocks.parameters())
    model.encoder.model.set_evolution(keep_ratio=1.0)
    torch.testing.assert_close(model(images), dense(images), rtol=1e-4, atol=1e-5)
