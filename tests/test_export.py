"""What is exported or traced gives the logits of the model, for any number of images."""
import copy
import gc
import warnings
from pathlib import Path

import onnx.inliner
import onnxruntime
import pytest
import small_vits
import timm
import torch
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from this_torch import ANY_SIZE, if_dense_can
from timm.models.vision_transformer import ParallelThingsBlock
from torch import Tensor, nn

import timm_evo
from timm_evo.method import sequences

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
STAGE = dict(selection='stage')  # not the default of all names
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
        # an older torch leaves functions of its own in the file, which OpenVINO knows nothing of
        onnx.save(onnx.inliner.inline_local_functions(onnx.load(file)), file.with_suffix('.inlined.onnx'))
        compiled = openvino.Core().compile_model(
            file.with_suffix('.inlined.onnx'), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
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


@pytest.mark.parametrize('name, settings', [
    ('evo_deit_tiny_patch16_224', dict()),
    ('evo_deit_tiny_patch16_224', SIMILARITY),
    ('evo_deit_tiny_patch16_224', dict(layerwise_updates=2)),
    ('evo_levit_128s', dict()),
])
@torch.no_grad()
def test_a_model_within_another_one_is_scripted_and_is_itself_afterwards(name, settings):
    model = create_model(name, (dict() if 'levit' in name else SMALL) | settings)
    size = model.pretrained_cfg['input_size'] if 'levit' in name else (3, SMALL['img_size'], SMALL['img_size'])
    images = torch.randn(2, *size)
    expected = model(images)
    around = nn.Sequential(nn.Identity(), model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # torch.jit.script is deprecated
        scripted = torch.jit.script(around)
    torch.testing.assert_close(scripted(images), expected)

    copied = copy.deepcopy(around)
    assert type(copied[1]) is type(model)
    for each in (around, copied):
        assert torch.equal(each(images), expected)
        assert isinstance(each[1], type(model)) and repr(each[1]) == repr(model)
        for method in ('forward_features', 'forward_intermediates'):
            torch.testing.assert_close(getattr(each[1], method)(images), getattr(model, method)(images))
    around[1].set_evolution(keep_ratio=0.9)
    assert model.evolution['keep_ratio'] == 0.9 and torch.equal(around(images), model(images))
    torch.testing.assert_close(torch.compile(around, backend='eager', fullgraph=True)(images), model(images))
    timm_evo.restore(around[1])
    assert torch.equal(around(images), model(images)) and 'Evo' not in type(model).__name__


def test_a_model_that_is_scripted_within_another_one_continues_to_count():
    around = nn.Sequential(nn.Identity(), create_model('evo_deit_tiny_patch16_224', SMALL | dict(layerwise_updates=5)))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # torch.jit.script is deprecated
        torch.jit.script(around)
    gc.collect()
    optimizer = torch.optim.SGD(around.train().parameters(), lr=1e-3)
    for _ in range(3):
        around(torch.randn(2, 3, SMALL['img_size'], SMALL['img_size'])).square().mean().backward()
        optimizer.step()
    assert int(around[1].num_updates) == 3


def test_a_backbone_is_scripted_where_the_dense_one_is():
    backbone = create_model('evo_levit_128s', dict(features_only=True, out_indices=(0, 1)))
    images = torch.randn(2, 3, 224, 224)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore', FutureWarning)  # torch.jit.script is deprecated
        maps = backbone(images)
        torch.testing.assert_close(torch.jit.script(backbone)(images), maps)
        torch.testing.assert_close(backbone(images), maps)


class OwnForward(timm_evo.EvoVisionTransformer):

    def forward(self, x):
        return self.forward_features(x)[:, 0]


def test_a_forward_of_a_users_class_is_scripted_as_it_is():
    model = OwnForward(**SMALL, selection='stage').eval()
    images = torch.randn(2, 3, SMALL['img_size'], SMALL['img_size'])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # torch.jit.script is deprecated
        torch.testing.assert_close(torch.jit.script(model)(images), model(images))


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
    for batch_size, size in ((1, (32, 32)), (3, (24, 40)), (2, (60, 36))):
        images = torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(3))
        expected = model(images).detach()
        torch.testing.assert_close(exported.module()(images), expected, rtol=0, atol=1e-4)
        # OpenVINO resizes position embeddings in another way, and so gives other logits, for the dense model, too
        logits = run(tmp_path / 'model.onnx', images)['onnxruntime']
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('settings', [
    STAGE, SIMILARITY, dict(selection='layer', stage_depth=None, keep_ratio=0.7, fast_update=False)])
def test_a_model_with_rotations_is_exported_with_an_open_image_size(settings):
    model = create_model('evo_vit_small_patch16_rope_mixed_224', SMALL | dict(dynamic_img_size=True) | settings)
    height, width = (4 * torch.export.Dim(name, min=4, max=32) for name in ('height', 'width'))
    shapes = ({0: torch.export.Dim('batch', max=64), 2: height, 3: width},)
    exported = if_dense_can(
        lambda model: torch.export.export(model, (torch.randn(2, 3, 32, 40),), dynamic_shapes=shapes), model).module()
    for batch_size, size in ((1, (32, 32)), (3, (24, 40)), (2, (60, 36))):
        images = torch.randn(batch_size, 3, *size)
        torch.testing.assert_close(exported(images), model(images), rtol=0, atol=1e-4)


@pytest.mark.skipif(
    torch.__version__ < torch.torch_version.TorchVersion('2.14'),
    reason='an older torch asks for the number of images itself, in attention with a mask or in a view')
@pytest.mark.parametrize('name, settings', [
    ('evo_deit_tiny_patch16_224', SMALL),
    ('evo_deit_tiny_patch16_224', SMALL | SIMILARITY),
    ('evo_vit_small_patch16_rope_224', SMALL | STAGE),
])
def test_a_compiler_need_not_know_how_many_images_there_are(name, settings):
    model, images = create_model(name, settings), random_images(settings)
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(
        model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
    with torch.no_grad():
        torch._dynamo.decorators.mark_unbacked(images, 0)
        compiled(images)
        for batch_size in BATCH_SIZES:
            batch = torch.randn(batch_size, *images.shape[1:])
            torch._dynamo.decorators.mark_unbacked(batch, 0)
            torch.testing.assert_close(compiled(batch), model(batch), rtol=0, atol=1e-4)
    assert len(graphs) == 1


def test_one_image_takes_the_fewer_steps_in_compiled_code_too():
    def count_steps(positions: Tensor) -> int:
        torch._dynamo.reset()
        graphs = []
        compiled = torch.compile(
            sequences.rows, backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
        assert torch.equal(compiled(positions, 5), sequences.rows(positions, 5))
        return len(graphs[0].graph.nodes)

    assert count_steps(torch.tensor([[3, 1]])) < count_steps(torch.tensor([[3, 1], [0, 2]]))


@pytest.mark.parametrize('name, settings', [
    ('evo_deit_tiny_patch16_224', SMALL),
    ('evo_deit_tiny_distilled_patch16_224', SMALL | SIMILARITY),
    ('evo_vit_tiny_patch16_224', SMALL | dict(
        selection='layer', stage_depth=None, class_token=False, global_pool='avg', block_fn=ParallelThingsBlock)),
    ('evo_vit_small_patch16_rope_mixed_224', SMALL | STAGE),
    ('evo_levit_128s', LEVIT),
    ('evo_levit_cls_128s', LEVIT),
])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_trace_by_torchscript_passes_its_own_check(name, settings, checkpointing):
    """It traces a second time, without gradients, and wants the same steps in the same order."""
    model, images = create_model(name, settings), random_images(settings)
    model.set_grad_checkpointing(checkpointing)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        traced = torch.jit.trace(model, images[:2])
    for batch_size in BATCH_SIZES:
        batch = images[:batch_size]
        torch.testing.assert_close(traced(batch), model(batch), rtol=0, atol=1e-4)


STAGES = [STAGE | settings for settings in [
    dict(), dict(fast_update=False), dict(keep_ratio=1.), dict(keep_ratio=[1., 0.5]),
    dict(keep_ratio=[0.5, 1.], fast_update=False)]]
LAYERS = dict(selection='layer', stage_depth=None, keep_ratio=[0.5, 1., 0.5], tradeoff=1.)


@pytest.mark.parametrize('name, settings', [
    *[(name, SMALL | settings)
      for name in (
          'evo_deit_tiny_patch16_224', 'evo_vit_small_patch16_rope_224', 'evo_vit_small_patch16_rope_mixed_224')
      for settings in [*STAGES, LAYERS, SIMILARITY]],
    *[('evo_levit_128s', LEVIT | settings) for settings in STAGES],
    *[('evo_levit_cls_128s', LEVIT | settings) for settings in [dict(), dict(keep_ratio=[1., 0.5])]],
])
def test_symbolic_tracing_gives_the_same_program(name, settings):
    model, images = create_model(name, settings), random_images(settings)
    traced = torch.fx.symbolic_trace(model)
    for batch_size in BATCH_SIZES:
        batch = images[:batch_size]
        torch.testing.assert_close(traced(batch), model(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize('name, settings', [
    ('evo_levit_128s', LEVIT),
    pytest.param('evo_levit_128s', LEVIT | dict(keep_ratio=1.0), marks=pytest.mark.slow),
    pytest.param('evo_levit_128s', LEVIT | dict(fast_update=False), marks=pytest.mark.slow),
    pytest.param('evo_levit_cls_128s', LEVIT | dict(selection='layer'), marks=pytest.mark.slow),
    pytest.param('evo_deit_tiny_patch16_224', SMALL, marks=pytest.mark.slow),
    ('evo_deit_tiny_patch16_224', SMALL | SIMILARITY),
    pytest.param('evo_deit_tiny_distilled_patch16_224', SMALL | dict(selection='layer'), marks=pytest.mark.slow),
    pytest.param(
        'evo_vit_tiny_patch16_224', SMALL | STAGE | dict(class_token=False, global_pool='avg'), marks=pytest.mark.slow),
    pytest.param('evo_vit_small_patch16_rope_mixed_224', SMALL | STAGE, marks=pytest.mark.slow),
])
def test_openvino_converts_the_model_itself(name, settings):
    convert = pytest.importorskip('openvino').convert_model
    model, images = create_model(name, settings), random_images(settings)[:5]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # tracing warns of every shape that it takes as given
        converted = convert(model, example_input=images[:2])
    compiled = openvino.compile_model(converted, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    expected = model(images).detach()
    for batch_size in (1, 2, 5):
        logits = torch.from_numpy(compiled(images[:batch_size].numpy())[0])
        torch.testing.assert_close(logits, expected[:batch_size], rtol=0, atol=1e-4)


class Calibration(quantization.CalibrationDataReader):

    def __init__(self, images: Tensor) -> None:
        self.batches = iter(images.split(1))

    def get_next(self) -> dict | None:
        batch = next(self.batches, None)
        return None if batch is None else {'images': batch.numpy()}


@pytest.mark.skipif(
    not hasattr(torch.export.Dim, 'DYNAMIC'),
    reason='onnxruntime cannot infer the shapes of the file that torch 2.5 writes')
@pytest.mark.parametrize('settings', [SIMILARITY, pytest.param(STAGE, marks=pytest.mark.slow)])
def test_an_exported_file_is_quantized(settings, tmp_path):
    """Its shapes are all inferred, as other tools ask for, too, and the integers give about the same logits."""
    model, images = create_model('evo_deit_tiny_patch16_224', SMALL | settings), random_images(SMALL)
    export(model, images, 'dynamo', tmp_path / 'model.onnx')
    quant_pre_process(tmp_path / 'model.onnx', tmp_path / 'shapes.onnx')
    quantization.quantize_static(
        tmp_path / 'shapes.onnx', tmp_path / 'int8.onnx', Calibration(images), per_channel=True,
        op_types_to_quantize=['MatMul', 'Gemm', 'Conv'])
    session = onnxruntime.InferenceSession(tmp_path / 'int8.onnx', providers=['CPUExecutionProvider'])
    logits = torch.from_numpy(session.run(None, {'images': images.numpy()})[0])
    expected = model(images).detach()
    assert (logits - expected).norm() / expected.norm() < 0.2
