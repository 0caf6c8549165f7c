"""Multiply-accumulates are counted by PyTorch's formulas, without an effect on the rest of the process."""
import threading

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode

from timm_evo import count_gmacs

SMALL = dict(img_size=48, patch_size=8, embed_dim=48, num_heads=3, depth=6)


@pytest.mark.parametrize('name, settings', [
    ('deit_tiny_patch16_224', SMALL),
    ('evo_vit_tiny_patch16_224', SMALL | dict(keep_ratio=1.0, global_pool='avg')),
    ('eva02_tiny_patch14_224', SMALL),
    ('levit_128s', {}),
])
def test_fused_attention_counts_as_its_products(name, settings):
    model = timm.create_model(name, **settings).eval()
    image = torch.randn(1, 3, *(settings.get('img_size', 224),) * 2)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image)
    assert count_gmacs(model, image) == pytest.approx(counter.get_total_flops() / 2e9, rel=1e-12)


@pytest.mark.parametrize('keep_ratio', [1.0, 0.5])
def test_weights_are_not_needed(keep_ratio):
    model = timm.create_model('evo_vit_tiny_patch16_224', keep_ratio=keep_ratio, **SMALL).eval()
    image = torch.randn(1, 3, 48, 48)
    assert count_gmacs(model.to('meta'), image.to('meta')) == count_gmacs(model.to_empty(device='cpu'), image)


def test_threads_count_side_by_side_and_leave_attention_fused():
    model = timm.create_model('evo_vit_tiny_patch16_224', **SMALL).eval()
    image = torch.randn(1, 3, 48, 48)
    expected, flags, counted, seen = count_gmacs(model, image), attention_flags(), [], []

    def count() -> None:
        for _ in range(20):
            counted.append(count_gmacs(model, image))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.append(attention_flags())
    assert set(counted) == {expected} and len(counted) == 80
    assert {*seen, attention_flags()} == {flags}
    assert not is_in_torch_dispatch_mode(), 'an older torch would compile nothing from now on'


def attention_flags() -> tuple[bool, ...]:
    """Of the whole process: what attention may be computed by."""
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
