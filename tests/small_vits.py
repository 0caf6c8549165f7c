"""timm's ViTs and their evolved twins, cut down in width and depth; what else makes them up is as registered."""
import timm
import torch
from torch import Tensor, nn


def create(name: str, seed: int = 0, **kwargs) -> nn.Module:
    """A model, cut down, whose tokens attend to each other unevenly."""
    torch.manual_seed(seed)
    num_patches = 6
    patch_size = 7 if 'patch14' in name else 8
    reduction = 4 if '_r_s16_' in name else 1  # of the convolutions before the patches
    if 'sapiens2' in name:
        kwargs = dict(num_kv_heads=1) | kwargs  # as registered, it has a number for each of its blocks
    model = timm.create_model(name, **dict(
        img_size=num_patches * patch_size * reduction, patch_size=patch_size,
        embed_dim=48, num_heads=3, depth=6, num_classes=5,
    ) | kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def images(model: nn.Module, batch_size: int = 2) -> Tensor:
    """As large as the model takes them."""
    return torch.randn(batch_size, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
