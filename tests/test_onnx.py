"""An ONNX file by either of PyTorch's exporters gives the logits of the model for any number of images."""
import warnings

import onnxruntime
import pytest
import timm
import torch
from torch import nn

SMALL = dict(img_size=32, patch_size=4, embed_dim=32, depth=6, num_heads=2, num_classes=7, start_block=2, stage_depth=2)


def create(name: str, settings: dict) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, exportable=True, **settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # far enough from zero that tokens and images differ
        for weights in model.parameters():
            weights.add_(torch.randn(weights.shape, generator=generator), alpha=0.1)
    return model


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
    model = create(name, settings)
    file = str(tmp_path / 'model.onnx')
    images = torch.randn(5, 3, *[settings['img_size']] * 2, generator=torch.Generator().manual_seed(2))
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
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    expected = model(images).detach()
    assert expected.std(dim=0).min() > 1e-2
    for batch_size in (1, 2, 5):
        logits, = session.run(None, {'images': images[:batch_size].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected[:batch_size], rtol=1e-4, atol=1e-4)
