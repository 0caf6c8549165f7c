""" What the weights of a dense model reach in evolved models, without further training

Puts the weights of a model that timm's train.py has trained into evolved models, over keep ratios, both kinds of
selection, and with and without fast update. All see the same images in one pass, and their throughput is measured in
turn, as `throughput.py` does:

    python benchmarks/without_training.py --checkpoint output/cifar10/runs/dense-seed0/last.pth.tar \
        --data-dir cifar10 --results benchmarks/results/without_training_cifar10

Model and preprocessing are those of the training, as the checkpoint has them.
"""
import argparse
from pathlib import Path

import timm
import torch
from _arguments import CollectKwargs, add_device, key_value, positive_int
from _measuring import DTYPES, Variant, measure, summarise
from _results import add_results, find_validation_split, markdown_table, write_results
from matplotlib.figure import Figure
from timm.data import ImageDataset, create_dataset, create_loader, resolve_data_config
from timm.models import load_checkpoint
from timm.utils import AverageMeter, accuracy
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

KEEP_RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
DENSE = 'dense'


def read_training_args(checkpoint: Path) -> dict:
    """The options that train.py has stored in a checkpoint."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(checkpoint, map_location='cpu', weights_only=True, mmap=True)
    return vars(content['args']) if 'args' in content else {}


def make_variants(model: str, kwargs: dict) -> tuple[list[Variant], dict[str, dict]]:
    """The dense model and all evolved ones, and the evolution arguments of the latter."""
    evolutions = {
        f'{selection}-wise, {"fast update" if fast_update else "only preserved"}, {keep_ratio}': {
            'selection': selection, 'fast_update': fast_update, 'keep_ratio': keep_ratio}
        for selection in ('stage', 'layer') for fast_update in (True, False) for keep_ratio in KEEP_RATIOS
    }
    evolved = [
        Variant(label, f'evo_{model}', {**kwargs, **evolution}, DENSE) for label, evolution in evolutions.items()]
    return [Variant(DENSE, model, kwargs, DENSE), *evolved], evolutions


def load_models(variants: list[Variant], checkpoint: Path, device: torch.device) -> dict[str, nn.Module]:
    """All models in evaluation mode, with the dense model's weights."""
    models = {variant.label: timm.create_model(variant.model, **variant.kwargs).eval() for variant in variants}
    load_checkpoint(models[DENSE], str(checkpoint), use_ema=False, weights_only=True)
    for model in models.values():
        model.load_state_dict(models[DENSE].state_dict())
        model.to(device)
    return models


def choose_images(data_dir: Path, num_images: int | None) -> ImageDataset:
    """Validation images, all or an evenly spread subset."""
    dataset = create_dataset('', root=str(data_dir), split=find_validation_split(data_dir))
    samples = dataset.reader.samples
    if num_images is not None:
        if num_images > len(samples):
            raise SystemExit(f'--num-images: there are only {len(samples)}')
        dataset.reader.samples = [samples[i * len(samples) // num_images] for i in range(num_images)]
    return dataset


@torch.inference_mode()
def measure_top1(models: dict[str, nn.Module], loader: DataLoader) -> dict[str, float]:
    meters = {label: AverageMeter() for label in models}
    with tqdm(total=len(loader) * len(models), unit='batch') as progress:
        for images, targets in loader:
            for label, model in models.items():
                progress.set_description(f'top-1 {label}', refresh=False)
                top1, = accuracy(model(images), targets)
                meters[label].update(top1.item(), len(targets))
                progress.update()
    return {label: meter.avg for label, meter in meters.items()}


def format_table(results: dict[str, dict]) -> str:
    rows = [
        [
            label,
            f'{row["top1"]:.2f}',
            f'{row["top1"] - results[DENSE]["top1"]:+.2f}' if label != DENSE else '',
            f'{row["images_per_second"]:.0f}',
            f'{row["ratio_to_dense"]:.2f} x' if label != DENSE else '',
            f'{row["gmacs"]:.3f}',
        ]
        for label, row in results.items()
    ]
    return markdown_table(['', 'top-1', 'to dense', 'img/s', 'ratio to dense', 'GMACs'], rows)


def draw(results: dict[str, dict], title: str) -> Figure:
    """Top-1 against throughput, a line of keep ratios for each kind of evolution."""
    figure = Figure(figsize=(8, 5.5), layout='constrained')
    axis = figure.subplots()
    axis.set_title(title, fontsize='medium')  # it is long
    axis.set(xlabel='inference, images/s', ylabel='top-1 (%)')
    axis.grid(alpha=0.3)
    dense = results[DENSE]
    axis.plot(dense['images_per_second'], dense['top1'], 'k*', markersize=14, linestyle='none', label=DENSE)

    lines: dict[str, list[dict]] = {}
    for label, row in results.items():
        if label != DENSE:
            lines.setdefault(label.rpartition(', ')[0], []).append(row)
    for i, (label, rows) in enumerate(lines.items()):
        x, y = [row['images_per_second'] for row in rows], [row['top1'] for row in rows]
        axis.plot(x, y, 'os^v'[i], linestyle='-' if rows[0]['fast_update'] else '--', markersize=5, label=label)
        if i == 0:
            for row in rows:
                axis.annotate(
                    f'{row["keep_ratio"]}', (row['images_per_second'], row['top1']), xytext=(5, 5),
                    textcoords='offset points', fontsize=8)
    axis.legend(title='selection; placeholders (points: keep ratio)')
    return figure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A dense model's weights in evolved models, without training.")
    parser.add_argument(
        '--checkpoint', type=Path, required=True, metavar='FILE', help='last.pth.tar of a dense model, by train.py')
    parser.add_argument(
        '--data-dir', type=Path, required=True, metavar='DIR', help='folder with train/ and validation/, val/ or test/')
    add_results(parser)
    parser.add_argument('--model', metavar='NAME', help="dense model (default: the checkpoint's)")
    parser.add_argument(
        '--model-kwargs',
        nargs='*',
        type=key_value,
        action=CollectKwargs,
        metavar='KEY=VALUE',
        help="arguments of the dense model, such as img_size=32 (default: the checkpoint's)",
    )
    add_device(parser)
    parser.add_argument(
        '--dtype',
        choices=DTYPES,
        default='float32',
        help='of weights and inputs while throughput is measured; top-1 is of float32 (default: float32)',
    )
    parser.add_argument('--batch-size', type=positive_int, default=64, metavar='N', help='images (default: 64)')
    parser.add_argument('--rounds', type=positive_int, default=11, metavar='N', help='timed rounds (default: 11)')
    parser.add_argument('--workers', type=int, default=0, metavar='N', help='processes that load images (default: 0)')
    parser.add_argument(
        '--num-images', type=positive_int, metavar='N', help='an evenly spread subset of this size (default: all)')
    args = parser.parse_args()
    if not args.checkpoint.is_file():
        parser.error(f'--checkpoint: there is no file {args.checkpoint}')
    return args


def main() -> None:
    args = parse_args()
    training_args = read_training_args(args.checkpoint)
    model = args.model or training_args.get('model')
    if model is None:
        raise SystemExit(f'{args.checkpoint} does not say what it is, use --model')
    if f'evo_{model}' not in timm.list_models():
        raise SystemExit(f'there is no evolved twin of {model}')
    kwargs = {'num_classes': training_args.get('num_classes'), 'global_pool': training_args.get('gp')}
    kwargs |= training_args.get('model_kwargs', {}) if args.model_kwargs is None else args.model_kwargs
    kwargs = {key: value for key, value in kwargs.items() if value is not None}

    variants, evolutions = make_variants(model, kwargs)
    models = load_models(variants, args.checkpoint, args.device)
    config = resolve_data_config(training_args, model=models[DENSE])
    dataset = choose_images(args.data_dir, args.num_images)
    loader = create_loader(
        dataset,
        input_size=config['input_size'],
        batch_size=args.batch_size,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        num_workers=args.workers,
        device=args.device,
    )
    top1 = measure_top1(models, loader)
    del models
    timed = measure(
        variants,
        device=args.device,
        dtype=DTYPES[args.dtype],
        batch_size=args.batch_size,
        rounds=args.rounds,
        train=False,
    )
    throughput = summarise(variants, timed, args.batch_size)
    results = {
        label: {**evolutions.get(label, {}), 'top1': top1[label], **row} for label, row in throughput.items()}

    subset = '' if args.num_images is None else ' (subset)'
    title = f'Weights of {model} without further training, {len(dataset)} validation images{subset}'
    settings = {
        'model': model,
        'model_kwargs': kwargs,
        'images': len(dataset),
        'subset': args.num_images is not None,
        'device': args.device.type,
        'dtype': args.dtype,
        'batch_size': args.batch_size,
        'rounds': args.rounds,
    }
    record = {'settings': settings, 'models': results}
    print(f'\n{write_results(args.results, title, format_table(results), record, draw(results, title))}')


if __name__ == '__main__':
    main()
