"""Use of a CUDA device, on a machine without one: tensors have shapes and a device, but no values."""
import pytest
import timm
import torch
from this_torch import run_without_interpreter
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call


def empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(tensor.shape, device='cuda', dtype=dtype if tensor.is_floating_point() else tensor.dtype)


def can_go_without_a_gpu() -> bool:
    """Whether operators take such tensors where there is no GPU. An older torch asks the GPU, of which kind it is."""
    try:
        with FakeTensorMode():
            image = torch.empty(1, 1, 8, 8, device='cuda')
            nn.functional.scaled_dot_product_attention(nn.functional.conv2d(image, image[:, :, :1, :1]), image, image)
    except RuntimeError:
        return torch.cuda.is_available()
    return True


@pytest.mark.skipif(not can_go_without_a_gpu(), reason='this torch wants a GPU for tensors without values, too')
@pytest.mark.parametrize('training, dtype', [(False, torch.bfloat16), (True, torch.float32)])
@pytest.mark.parametrize('name, settings', [
    ('evo_deit_tiny_patch16_224', dict()),
    ('evo_deit_tiny_patch16_224', dict(selection='layer', global_pool='avg', class_head=True)),
    ('evo_deit_tiny_distilled_patch16_224', dict(fast_update=False)),
    ('evo_vit_tiny_patch16_224', dict(class_token=False, global_pool='avg', qk_norm=True)),
    ('evo_levit_128s', dict()),
    ('evo_levit_cls_128s', dict()),
])
@torch.no_grad()
def test_the_cpu_never_waits_for_the_gpu(name, settings, training, dtype):
    """No value is read back, which such tensors refuse, and no tensor of another device takes part."""
    model = timm.create_model(name, num_classes=5, **settings).train(training)
    with FakeTensorMode():
        state = {
            key: empty_like(tensor, dtype) for key, tensor in [*model.named_parameters(), *model.named_buffers()]}
        images = torch.empty(4, *model.default_cfg['input_size'], device='cuda', dtype=dtype)
        logits = functional_call(model, state, images)
        assert logits.device.type == 'cuda' and logits.dtype == dtype and logits.shape == (4, 5)


@pytest.mark.skipif(not can_go_without_a_gpu(), reason='this torch wants a GPU for tensors without values, too')
@pytest.mark.skipif(not hasattr(torch.library, 'triton_op'), reason='this torch takes no Triton operators')
def test_a_selection_adds_few_launches():
    """A small kernel takes a GPU as long as the launch of a large one."""
    names = ('deit_small_patch16_224', 'vit_small_patch16_dinov3')
    counts = {
        (setting, name, selection): int(number)
        for setting in ('0', '') for name, selection, number in run_without_interpreter(
            'count_operators.py', *names, TIMM_EVO_KERNELS=setting)}
    for name in names:
        dense = counts['', name, 'dense']
        more = {selection: counts['', name, selection] - dense for selection in ('stage', 'layer', 'similarity')}
        assert more['stage'] <= 20 and more['layer'] <= 56 and more['similarity'] <= 30, (dense, more)
        steps = {selection: counts['0', name, selection] - dense for selection in more}
        assert steps['stage'] <= 136 and steps['layer'] <= 349 and steps['similarity'] <= 439, (dense, steps)
