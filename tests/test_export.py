"""What is exported gives the logits of the model for any number of images: by torch.export, TorchScript and ONNX."""
import warnings
from pathlib import Path

import onnxruntime
import pytest
import small_vits
import timm
import torch
from this_torch import ANY_SIZE, if_dense_can
from torch import Tensor, nn

try:
    import openvino
except ImportError:  # it has no release for some platforms
    openvino = None

# one block that sees all tokens, a segment of two and one of one; exporters take their time for each block
SHORT = dict(depth=4, start_block=1, stage_depth=2)
SMALL = dict(img_size=32, patch_size=4, embed_dim=32, num_heads=2, num_classes=7, **SHORT)
LEVIT = dict(img_size=128, depth=(1, 2, 1), num_classes=7, start_block=1)
TWO_MERGES = dict(depth=3, keep_ratio=[0.7, 0.5])
SIMILARITY = dict(selection='similarity', stage_depth=None, **TWO_MERGES)
BATCH_SIZES = (1, 2, 8)
VITS = [
    'vit_small_patch14_reg4_dinov2',  # registers and LayerScale
    pytest.param('vit_base_patch16_siglip_224', marks=pytest.mark.slow),  # attention pooling without a class token
    pytest.param('vit_base_patch16_clip_224', marks=pytest.mark.slow),  # a norm before the blocks
    pytest.param('test_vit3', marks=pytest.mark.slow),  # normalised queries and keys
    pytest.param('vit_tiny_r_s16_p8_224', marks=pytest.mark.slow),  # convolutions before the patches
]


def create_model(name: str, settings: dict) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, exportable=True, **settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # far enough from zero that tokens and images differ
        for weights in model.parameters():
            weights.add_(torch.randn(weights.shape, generator=generator), alpha=0.1)
    return model


def random_images(settings: dict) -> Tensor:
    return torch.randn(max(BATCH_SIZES), 3, *[settings['img_size']] * 2, generator=torch.Generator().manual_seed(2))


def export(model: nn.Module, images: Tensor, exporter: str, file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # tracing warns of every shape that it takes as given
        if exporter == 'traced':
            torch.onnx.export(
                model, (images[:1],), file, dynamo=False, input_names=['images'], output_names=['logits'],
                dynamic_axes={'images': {0: 'batch'}, 'logits': {0: 'batch'}})
        else:
            torch.onnx.export(
                model, (images[:2],), file, dynamo=True, verbose=False, input_names=['images'],
                dynamic_shapes=({0: ANY_SIZE},))


def run(file: Path, images: Tensor) -> dict[str, Tensor]:
    """Logits by each runtime that is installed."""
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    logits = {'onnxruntime': session.run(None, {'images': images.numpy()})[0]}
    if openvino is not None:
        compiled = openvino.Core().compile_model(file, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
        logits['OpenVINO'], = compiled(images.numpy()).values()
    return {runtime: torch.from_numpy(values) for runtime, values in logits.items()}


@pytest.mark.parametrize('exporter', ['traced', 'dynamo'])
@pytest.mark.parametrize('name, settings', [
    pytest.param('evo_deit_tiny_patch16_224', SMALL, marks=pytest.mark.slow),  # below, with an open image size
    pytest.param('evo_deit_tiny_patch16_224', SMALL | dict(qk_norm=True, selection='layer'), marks=pytest.mark.slow),
    ('evo_deit_tiny_patch16_224', SMALL | dict(global_pool='avg', class_head=True, fast_update=False)),
    ('evo_deit_tiny_distilled_patch16_224', SMALL | SIMILARITY),
    pytest.param('evo_levit_128s', LEVIT, marks=pytest.mark.slow),
    pytest.param('evo_levit_cls_128s', LEVIT, marks=pytest.mark.slow),
])
def test_onnx_gives_the_logits_at_any_batch_size(name, settings, exporter, tmp_path):
    model, images = create_model(name, settings), random_images(settings)
    export(model, images, exporter, tmp_path / 'model.onnx')
    expected = model(images).detach()
    assert expected.std(dim=0).min() > 1e-2
    for batch_size in BATCH_SIZES:
        for runtime, logits in run(tmp_path / 'model.onnx', images[:batch_size]).items():
            difference = (logits - expected[:batch_size]).abs().max()
            assert difference < 1e-4, f'{runtime}, batch {batch_size}: {difference}'


@pytest.mark.parametrize('name', VITS)
def test_every_kind_of_vit_is_exported(name, tmp_path):
    model = small_vits.create(f'evo_{name}', exportable=True, **TWO_MERGES)
    images = small_vits.images(model, max(BATCH_SIZES))
    exported = torch.export.export(model, (images[:2],), dynamic_shapes=({0: ANY_SIZE},))
    torch.onnx.export(exported, f=tmp_path / 'model.onnx', dynamo=True, verbose=False, input_names=['images'])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # torch.jit.script is deprecated
        scripted = torch.jit.script(model)

    expected = model(images).detach()
    assert expected.std(dim=0).min() > 1e-2
    for batch_size in BATCH_SIZES:
        batch = images[:batch_size]
        all_logits = {'torch.export': exported.module()(batch), 'TorchScript': scripted(batch)}
        all_logits |= run(tmp_path / 'model.onnx', batch)
        for runtime, logits in all_logits.items():
            difference = (logits - expected[:batch_size]).abs().max()
            assert difference < 1e-4, f'{runtime}, batch {batch_size}: {difference}'


@pytest.mark.parametrize('settings', [
    dict(),
    pytest.param(dict(selection='layer', keep_ratio=0.7, fast_update=False), marks=pytest.mark.slow),
    pytest.param(SIMILARITY, marks=pytest.mark.slow),
])
def test_an_export_may_leave_the_image_size_open(settings, tmp_path):
    """As timm's dense model with `dynamic_img_size`: how many tokens are slow follows from the grid."""
    model = create_model('evo_deit_tiny_patch16_224', SMALL | dict(dynamic_img_size=True) | settings)
    height, width = (4 * torch.export.Dim(name, min=4, max=32) for name in ('height', 'width'))
    shapes = ({0: torch.export.Dim('batch', max=64), 2: height, 3: width},)
    exported = if_dense_can(
        lambda model: torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=shapes), model)
    torch.onnx.export(exported, f=tmp_path / 'model.onnx', dynamo=True, verbose=False, input_names=['images'])
    for size in ((32, 32), (24, 40), (60, 36)):
        images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(3))
        expected = model(images).detach()
        torch.testing.assert_close(exported.module()(images), expected, rtol=0, atol=1e-4)
        # OpenVINO resizes position embeddings in another way, and so gives other logits, for the dense model, too
        logits = run(tmp_path / 'model.onnx', images)['onnxruntime']
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
