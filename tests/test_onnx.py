"""An ONNX file by either of PyTorch's exporters gives the logits of the model for any number of images."""
import warnings
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

SMALL = dict(img_size=32, patch_size=4, embed_dim=32, depth=6, num_heads=2, num_classes=7, start_block=2, stage_depth=2)
BATCH_SIZES = (1, 2, 8)


def create(name: str, settings: dict) -> nn.Module:
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
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


@pytest.mark.parametrize('exporter', ['traced', 'dynamo'])
@pytest.mark.parametrize('name, settings', [
    ('evo_deit_tiny_patch16_224', SMALL),
    ('evo_deit_tiny_patch16_224', SMALL | dict(qk_norm=True, selection='layer')),
    ('evo_deit_tiny_patch16_224', SMALL | dict(global_pool='avg', class_head=True, fast_update=False)),
    ('evo_deit_tiny_distilled_patch16_224', SMALL),
    ('evo_levit_128s', dict(img_size=128, num_classes=7)),
    ('evo_levit_cls_128s', dict(img_size=128, num_classes=7)),
])
def test_onnx_gives_the_logits_at_any_batch_size(name, settings, exporter, tmp_path):
    model, images = create(name, settings), random_images(settings)
    export(model, images, exporter, tmp_path / 'model.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    expected = model(images).detach()
    assert expected.std(dim=0).min() > 1e-2
    for batch_size in BATCH_SIZES:
        logits, = session.run(None, {'images': images[:batch_size].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected[:batch_size], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name, settings', [
    ('evo_deit_tiny_patch16_224', SMALL),
    ('evo_levit_128s', dict(img_size=128, num_classes=7)),
])
def test_openvino_runs_the_file_at_any_batch_size(name, settings, tmp_path):
    openvino = pytest.importorskip('openvino')
    model, images = create(name, settings), random_images(settings)
    export(model, images, 'dynamo', tmp_path / 'model.onnx')
    compiled = openvino.Core().compile_model(tmp_path / 'model.onnx', 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    expected = model(images).detach()
    for batch_size in BATCH_SIZES:
        logits, = compiled(images[:batch_size].numpy()).values()
        torch.testing.assert_close(torch.from_numpy(logits), expected[:batch_size], rtol=1e-4, atol=1e-4)
