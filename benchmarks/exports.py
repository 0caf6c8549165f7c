""" Exported files of a model, evolved and dense: their sizes, how near their logits are to the model's, and their times

    python benchmarks/exports.py --weights deit_tiny.safetensors --results benchmarks/results/exports_cpu

Files are written as docs/deployment.md says, for any number of images. Logits are compared with those of the model in
PyTorch, on four photos of scikit-image. Evolved and dense file of a format are timed batch by batch in turn, in float32
where the format says nothing else. Results are written after each format, so the same command continues an interrupted
run.
"""
import argparse
import statistics
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from common.arguments import positive_int
from common.environment import describe_environment, summarise_environment
from common.exported import THREADS, Run, load_file, median_ratio, time_in_turn
from common.measuring import LATENCY_ROUNDS
from common.report import write_report
from common.results import add_results, markdown_table, read_records
from PIL import Image
from skimage import data
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from tqdm import tqdm

from timm_evo import count_gmacs

EVOLVED = {'selection': 'similarity', 'keep_ratio': 0.7}
BATCH_SIZES = (16, 1)
LIBRARIES = ('onnx', 'onnxscript', 'onnxruntime', 'openvino', 'scikit-image')


class Exported(NamedTuple):
    """A model that was exported.

    Attributes:
        files: What has to be deployed.
        run: Images (B, 3, H, W) to logits (B, num_classes).
    """
    files: list[Path]
    run: Run


def any_batch() -> tuple[dict]:
    return {0: torch.export.Dim('batch')},


def write_onnx(model: nn.Module, images: Tensor, folder: Path) -> Path:
    file = folder / 'model.onnx'
    if not file.exists():  # three formats are made of it
        torch.onnx.export(
            model, (images,), file, dynamo=True, input_names=['images'], external_data=False,
            dynamic_shapes=any_batch(), verbose=False)
    return file


def to_onnx(model: nn.Module, images: Tensor, folder: Path) -> Exported:
    file = write_onnx(model, images, folder)
    return Exported([file], load_file(file, 'onnxruntime'))


def to_int8(model: nn.Module, images: Tensor, folder: Path) -> Exported:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Photos(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{'images': image[None].numpy()} for image in images])

        def get_next(self) -> dict | None:
            return next(self.batches, None)

    shapes, file = folder / 'shapes.onnx', folder / 'int8.onnx'
    quant_pre_process(write_onnx(model, images, folder), shapes)
    quantization.quantize_static(
        shapes, file, Photos(), per_channel=True, op_types_to_quantize=['MatMul', 'Gemm', 'Conv'])
    return Exported([file], load_file(file, 'onnxruntime'))


def to_openvino(model: nn.Module, images: Tensor, folder: Path) -> Exported:
    import openvino
    file = folder / 'model.xml'
    openvino.save_model(openvino.convert_model(write_onnx(model, images, folder)), file)
    return Exported([file, file.with_suffix('.bin')], load_file(file, 'OpenVINO'))


def to_program(model: nn.Module, images: Tensor, folder: Path) -> Exported:
    file = folder / 'model.pt2'
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=any_batch()), file)
    return Exported([file], torch.export.load(file).module())


def to_library(model: nn.Module, images: Tensor, folder: Path) -> Exported:
    file = folder / 'aoti.pt2'
    program = torch.export.export(model, (images,), dynamic_shapes=any_batch())
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    return Exported([file], torch._inductor.aoti_load_package(str(file)))


def to_trace(model: nn.Module, images: Tensor, folder: Path) -> Exported:
    file = folder / 'model.pt'
    torch.jit.trace(model, images).save(file)
    return Exported([file], torch.jit.load(file))


FORMATS: dict[str, Callable[[nn.Module, Tensor, Path], Exported]] = {
    'ONNX': to_onnx,
    'ONNX in int8': to_int8,
    'OpenVINO, weights in float16': to_openvino,
    'torch.export': to_program,
    'AOTInductor': to_library,
    'torch.jit.trace': to_trace,
}


def load_photos(model: nn.Module) -> Tensor:
    """Four photos (4, 3, H, W)."""
    transform = create_transform(**resolve_data_config({}, model=model))
    photos = (data.chelsea(), data.coffee(), data.astronaut(), data.rocket())
    return torch.stack([transform(Image.fromarray(photo)) for photo in photos])


@torch.inference_mode()
def compare(run: Run, model: nn.Module, images: Tensor) -> dict[str, float]:
    """How far logits of a file are from those of the model, and for how many images they say the same class."""
    found, expected = run(images), model(images)
    return {
        'largest_difference': (found - expected).abs().max().item(),
        'same_class': (found.argmax(dim=1) == expected.argmax(dim=1)).sum().item(),
    }


def measure(name: str, models: dict[str, nn.Module], images: Tensor, folder: Path, rounds: int) -> dict:
    """Sizes, differences and seconds of a format, by model."""
    record: dict = {}
    run: dict[str, Run] = {}
    for label, model in (progress := tqdm(models.items(), unit='file')):
        progress.set_description(f'export {label}')
        (own := folder / label).mkdir(exist_ok=True)
        exported = FORMATS[name](model, images, own)
        run[label] = exported.run
        record[label] = {
            'mb': sum(file.stat().st_size for file in exported.files) / 1e6,
            **compare(exported.run, model, images), 'seconds': {}}
    for batch_size in BATCH_SIZES:
        batch = torch.randn(batch_size, *images.shape[1:])
        seconds = time_in_turn(
            run, batch, rounds * LATENCY_ROUNDS if batch_size == 1 else rounds, f'batch {batch_size}')
        for label in models:
            record[label]['seconds'][str(batch_size)] = seconds[label]
        record[f'batch_{batch_size}'] = {
            **{f'{label}_ms_per_batch': 1000 * statistics.median(values) for label, values in seconds.items()},
            'evolved_to_dense': median_ratio(seconds, 'evolved', 'dense')}
    return record


def format_text(records: dict[str, dict], described: dict) -> str:
    header = ['', *(
        f'{label}, {what}' for what in ('MB', 'largest difference', 'same class') for label in ('dense', 'evolved'))]
    for batch_size in BATCH_SIZES:
        header += [f'dense, ms/batch of {batch_size}', f'evolved : dense, batch {batch_size}']
    rows = []
    for name, record in records.items():
        pair = record['dense'], record['evolved']
        rows.append([
            name,
            *(f'{of["mb"]:.1f}' for of in pair),
            *(f'{of["largest_difference"]:.1e}' for of in pair),
            *(f'{of["same_class"]} of {described["images"]}' for of in pair),
            *(text for batch_size in BATCH_SIZES for text in (
                f'{record[f"batch_{batch_size}"]["dense_ms_per_batch"]:.1f}',
                f'{record[f"batch_{batch_size}"]["evolved_to_dense"]:.2f} x')),
        ])
    gmacs, rounds = described['gmacs'], described['rounds']
    settings = ', '.join(f'{key}={value!r}' for key, value in EVOLVED.items())
    title = (
        f'Exported files of {described["model"]}, dense ({gmacs["dense"]:.2f} GMACs) and with {settings} '
        f'({gmacs["evolved"]:.2f} GMACs, a limit of {gmacs["dense"] / gmacs["evolved"]:.2f} x): sizes, and the largest '
        'difference of a logit from the model in PyTorch')
    how = ', '.join(f'{name} {described["versions"][name]}' for name in ('onnxruntime', 'openvino'))
    speed = f'median of {rounds} rounds, and of {rounds * LATENCY_ROUNDS} with one image'
    return f'{title}\n\n{markdown_table(header, rows)}\n{summarise_environment(described)}, {how}; {speed}.\n'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Sizes, differences and times of exported files.')
    parser.add_argument(
        '--model', default='deit_tiny_patch16_224', help='dense model that has an evolved twin (default: %(default)s)')
    parser.add_argument(
        '--weights', type=Path, metavar='FILE', help='checkpoint of the dense model (default: pretrained ones)')
    parser.add_argument(
        '--rounds', type=positive_int, default=31, metavar='N',
        help=f'timed rounds, {LATENCY_ROUNDS} times as many with one image (default: 31)')
    add_results(parser, ('.json', '.md'))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(THREADS)
    weights = {'pretrained': args.weights is None, 'checkpoint_path': args.weights or '', 'exportable': True}
    models = {
        'dense': timm.create_model(args.model, **weights).eval(),
        'evolved': timm.create_model(f'evo_{args.model}', **weights, **EVOLVED).eval(),
    }
    images = load_photos(models['dense'])
    described = describe_environment(torch.device('cpu'))
    described['versions'] |= {name: version(name) for name in LIBRARIES}
    described |= {
        'model': args.model, 'evolution': EVOLVED, 'images': len(images), 'rounds': args.rounds,
        'gmacs': {label: count_gmacs(model, images[:1]) for label, model in models.items()}}
    records = read_records(args.results, described)
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(FORMATS):
            print(f'{i + 1} of {len(FORMATS)}: {name}')
            if name in records:
                print('    measured before')
                continue
            records[name] = measure(name, models, images, Path(folder), args.rounds)
            records = {known: records[known] for known in FORMATS if known in records}
            write_report(args.results, format_text(records, described), {**described, 'settings': records})
    print(f'\n{format_text(records, described)}')


if __name__ == '__main__':
    main()
