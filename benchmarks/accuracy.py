""" Accuracy and speed of models trained by timm's train.py with one recipe

Trains every variant of a recipe with every seed, one after the other, with timm's unchanged train.py. Then it measures
the throughput of all variants in turn, as in `throughput.py`:

    TIMM_SCRIPTS=~/pytorch-image-models python benchmarks/accuracy.py --recipe benchmarks/recipes/cifar10.yaml \
        --data-dir cifar10 --output output/cifar10 --results benchmarks/results/cifar10

The same command continues an interrupted run. A table, a plot and a JSON file are written after each training.
"""
import argparse
import fcntl
import os
import shutil
import signal
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch
from common.arguments import add_device, positive_int
from common.measuring import DTYPES, Variant, dense_twin, measure, summarise
from common.recipe import Entry, parse_options, read_recipe
from common.results import add_results, find_validation_split, markdown_table, write_results
from common.training import Training
from matplotlib.figure import Figure
from timm.data import create_dataset
from tqdm import tqdm

ROUNDS = 21
MAX_WORKERS = 16


def lock_folder(folder: Path) -> IO:
    """Lock a folder, or exit if it is in use. train.py holds the lock, too, and may run longer than this process."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / 'lock', 'w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f'--output: another process uses {folder}. It may be a train.py of an earlier run.') from None
    return lock


def link_images(data_dir: Path, split: str, target: Path, per_class: int | None) -> int:
    """Link the images of a split, or the first ones of each class, to `target`, and return their number."""
    files = [Path(file) for file, _ in create_dataset('', root=str(data_dir), split=split).reader.samples]  # in order
    if per_class is None:
        target.symlink_to((data_dir / split).resolve())
        return len(files)
    classes = defaultdict(list)
    for file in files:
        classes[file.parent.name].append(file)
    for name, files in classes.items():
        if len(files) < per_class:
            raise SystemExit(f'{split} has {len(files)} images of {name}, fewer than {per_class}')
        (target / name).mkdir(parents=True)
        for file in files[:per_class]:
            (target / name / file.name).symlink_to(file.resolve())
    return per_class * len(classes)


def prepare_images(args: argparse.Namespace) -> tuple[dict, dict]:
    """Options of train.py for the images, and the description of the images for the results."""
    split = find_validation_split(args.data_dir)
    folder = args.output / 'images'
    shutil.rmtree(folder, ignore_errors=True)  # the links may be old
    folder.mkdir()
    numbers = {
        'train_images': link_images(args.data_dir, 'train', folder / 'train', args.images_per_class),
        'validation_images': link_images(args.data_dir, split, folder / 'validation', args.val_images_per_class),
        'train_images_per_class': args.images_per_class,
        'validation_images_per_class': args.val_images_per_class,
    }
    return {'data_dir': str(folder), 'train_split': 'train', 'val_split': 'validation'}, numbers


def plan_trainings(entries: list[Entry], script: Path, images: dict, runs: Path) -> list[Training]:
    """All trainings. The first seed of all variants comes before the second seed."""
    trainings = []
    for entry in entries:
        num_epochs, num_updates = entry.count(script, images['train_images'])
        for i, seed in enumerate(entry.seeds):
            recipe = {'options': entry.training_options(num_updates, seed), 'images': images}
            folder = runs / f'{entry.label}-seed{seed}'
            trainings.append((i, Training(entry.label, seed, num_epochs, recipe, folder)))
    return [training for _, training in sorted(trainings, key=lambda pair: pair[0])]


def train_all(
        trainings: list[Training],
        script: Path,
        places: dict,
        lock: IO,
        write: Callable[[], None],
) -> None:
    """Run the unfinished trainings, one after the other, and call `write` after each."""
    total = sum(training.num_epochs for training in trainings)
    done = sum(training.epochs_done() for training in trainings)
    with tqdm(total=total, initial=done, unit='epoch') as progress:
        for training in trainings:
            if training.is_finished():
                continue
            others = sum(other.epochs_done() for other in trainings if other is not training)

            def report(training: Training = training, others: int = others) -> None:
                progress.set_description(f'{training.label}, seed {training.seed}', refresh=False)
                top1 = training.summary()['eval_top1']
                if len(top1):
                    progress.set_postfix_str(f'top-1 {top1.iloc[-1]:.2f}', refresh=False)
                progress.update(others + training.epochs_done() - progress.n)
                progress.refresh()

            training.run(script, places, lock, report)
            write()


def make_variants(entries: list[Entry], script: Path) -> list[Variant]:
    """The model of each entry after training, which is compared with the dense model with the same head."""
    models = {}
    for entry in entries:
        args = parse_options(script, entry.options)
        kwargs = {'num_classes': args.num_classes, 'global_pool': args.gp, 'drop_path_rate': args.drop_path}
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        models[entry.label] = args.model, {**kwargs, **args.model_kwargs}

    def find_twin(label: str) -> str:
        model, kwargs = models[label]
        for other, (other_model, other_kwargs) in models.items():
            same_head = other_kwargs.get('global_pool') == kwargs.get('global_pool')
            # the evolved one also has arguments of evolution
            if other_model == dense_twin(model) and same_head and other_kwargs.items() <= kwargs.items():
                return other
        return label

    return [Variant(label, model, kwargs, find_twin(label)) for label, (model, kwargs) in models.items()]


def measure_throughput(entries: list[Entry], variants: list[Variant], settings: dict) -> dict[str, dict]:
    """Throughput of all variants in inference and training, see `summarise`.

    If selection is layer-wise at first, both phases of training are measured, and weighted by their shares.
    """
    arguments = dict(
        device=torch.device(settings['device']),
        dtype=torch.float32,
        autocast=DTYPES[settings['autocast']] if settings['autocast'] else None,
        batch_size=settings['batch_size'],
        rounds=settings['rounds'],
    )
    inference = measure(variants, train=False, **arguments)

    shares = {entry.label: entry.layerwise_share for entry in entries}
    layerwise = [
        Variant(f'{variant.label}, layer-wise', variant.model, variant.kwargs | {'selection': 'layer'}, variant.dense)
        for variant in variants if shares[variant.label]
    ]
    training = measure(variants + layerwise, train=True, **arguments)
    for label, share in shares.items():
        if share:
            phases = zip(training[f'{label}, layer-wise']['seconds'], training[label]['seconds'], strict=True)
            training[label]['seconds'] = [share * first + (1 - share) * then for first, then in phases]
    return {
        'inference': summarise(variants, inference, arguments['batch_size']),
        'training': summarise(variants, training, arguments['batch_size']),
    }


def collect(trainings: list[Training], variants: list[Variant], throughput: dict[str, dict]) -> dict[str, dict]:
    """Results of each variant with a finished training."""
    collected = {}
    for variant in variants:
        finished = [training for training in trainings if training.label == variant.label and training.is_finished()]
        if not finished:
            continue
        curves = {training.seed: training.summary().set_index('epoch')['eval_top1'] for training in finished}
        last = [curve.iloc[-1] for curve in curves.values()]
        collected[variant.label] = {
            'model': variant.model,
            'options': {key: value for key, value in finished[0].recipe['options'].items() if key != 'seed'},
            'compared_with': variant.dense,
            'top1': statistics.mean(last),
            'top1_standard_deviation': statistics.stdev(last) if len(last) > 1 else None,
            'seeds': {
                str(seed): {
                    'top1': curve.iloc[-1], 'best_top1': curve.max(), 'best_epoch': int(curve.idxmax()),
                    'top1_by_epoch': {str(int(epoch)): top1 for epoch, top1 in curve.items()},
                }
                for seed, curve in curves.items()
            },
            **{phase: rows[variant.label] for phase, rows in throughput.items()},
        }
    return collected


def format_title(name: str, num_epochs: int, images: dict) -> str:
    parts = [f'{images["train_images"]} training images', f'{images["validation_images"]} validation images']
    for i, key in enumerate(('train_images_per_class', 'validation_images_per_class')):
        if images[key] is not None:
            parts[i] += f' (subset: {images[key]} per class)'
    return f'{name}: {num_epochs} epochs, {", ".join(parts)}'


def format_table(results: dict[str, dict]) -> str:
    def speed(row: dict, phase: str) -> list[str]:
        if phase not in row:
            return ['', '']
        ratio = f'{row[phase]["ratio_to_dense"]:.2f} x' if row['compared_with'] != label else ''
        return [f'{row[phase]["images_per_second"]:.0f}', ratio]

    lines = []
    for label, row in results.items():
        spread = row['top1_standard_deviation']
        cost = row.get('inference')
        lines.append([
            label,
            f'{row["top1"]:.2f}' + (f' ± {spread:.2f}' if spread is not None else ''),
            str(len(row['seeds'])),
            *speed(row, 'training'),
            *speed(row, 'inference'),
            f'{cost["gmacs"]:.3f}' if cost else '',
            f'{cost["params"] / 1e6:.2f}' if cost else '',
        ])
    header = [
        'variant', 'top-1', 'seeds', 'train img/s', 'ratio to dense', 'infer img/s', 'ratio to dense', 'GMACs',
        'params (M)']
    return markdown_table(header, lines)


def draw(results: dict[str, dict], title: str) -> Figure:
    """Top-1 by epoch, with the range of the seeds, and if it is measured against throughput."""
    measured = any('inference' in row for row in results.values())
    figure = Figure(figsize=(15 if measured else 8, 5), layout='constrained')
    figure.suptitle(title)
    axes = figure.subplots(1, 3 if measured else 1, squeeze=False)[0]
    axes[0].set(xlabel='epoch', ylabel='top-1 (%)')
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    for i, (label, row) in enumerate(results.items()):
        style = dict(color=f'C{i % 10}', marker='os^'[i // 10 % 3])
        curves = torch.tensor([list(seed['top1_by_epoch'].values()) for seed in row['seeds'].values()])
        epochs = [int(epoch) + 1 for epoch in next(iter(row['seeds'].values()))['top1_by_epoch']]
        axes[0].plot(epochs, curves.mean(0), '-' if i < 10 else '--', label=label, markevery=[-1], **style)
        axes[0].fill_between(epochs, curves.amin(0), curves.amax(0), color=style['color'], alpha=0.2, linewidth=0)
        for axis, phase in zip(axes[1:], ('training', 'inference'), strict=False):
            x = row[phase]['ratio_to_dense']  # models of several families and image sizes share the axis
            axis.errorbar(x, row['top1'], yerr=row['top1_standard_deviation'], linestyle='none', capsize=3, **style)
            axis.set(xlabel=f'{phase} throughput, ratio to dense', ylabel='top-1 after the last epoch (%)')
            axis.locator_params(axis='x', nbins=5)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper')
    return figure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Accuracy and speed of models trained by timm's train.py.")
    parser.add_argument('--recipe', type=Path, required=True, metavar='FILE', help='file of the recipe, see recipes/')
    parser.add_argument(
        '--data-dir', type=Path, required=True, metavar='DIR', help='folder with train/ and validation/, val/ or test/')
    parser.add_argument(
        '--scripts',
        type=Path,
        default=os.environ.get('TIMM_SCRIPTS'),
        metavar='DIR',
        help="folder with timm's train.py (default: the environment variable TIMM_SCRIPTS)",
    )
    parser.add_argument('--output', type=Path, required=True, metavar='DIR', help='folder for checkpoints and logs')
    add_results(parser)
    add_device(parser)
    parser.add_argument('--variants', nargs='+', metavar='LABEL', help='variants to train (default: all of the recipe)')
    parser.add_argument('--seeds', nargs='+', type=int, metavar='N', help="seeds instead of the recipe's")
    parser.add_argument('--epochs', type=positive_int, metavar='N', help="epochs instead of the recipe's")
    parser.add_argument(
        '--images-per-class', type=positive_int, metavar='N', help='train on the first N of each class (default: all)')
    parser.add_argument(
        '--val-images-per-class',
        type=positive_int,
        metavar='N',
        help='validate with the first N of each class (default: all)',
    )
    args = parser.parse_args()
    if not args.recipe.is_file():
        parser.error(f'--recipe: there is no file {args.recipe}')
    if args.scripts is None or not (args.scripts / 'train.py').is_file():
        where = f'there is no train.py in {args.scripts}' if args.scripts else 'neither it nor TIMM_SCRIPTS is set'
        parser.error(f"--scripts: {where}. It must be the folder with train.py of timm's repository.")
    args.output = args.output.resolve()  # train.py and the links need absolute paths
    return args


def choose_entries(args: argparse.Namespace) -> list[Entry]:
    entries = read_recipe(args.recipe, args.seeds, args.epochs)
    if args.variants is None:
        return entries
    labels = [entry.label for entry in entries]
    unknown = [label for label in args.variants if label not in labels]
    if unknown:
        raise SystemExit(f'--variants: the recipe has no {", ".join(unknown)}, only {", ".join(labels)}')
    return [entry for entry in entries if entry.label in args.variants]


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that train.py ends, too
    entries = choose_entries(args)
    lock = lock_folder(args.output)
    script = args.output / 'train.py'
    shutil.copy(args.scripts / 'train.py', script)  # a copy, because a script imports the `timm` in its own folder
    places, images = prepare_images(args)
    trainings = plan_trainings(entries, script, images, args.output / 'runs')
    for training in trainings:
        training.check_recipe()
    variants = make_variants(entries, script)

    options = parse_options(script, entries[0].options)
    settings = {
        'recipe': args.recipe.name,
        'images': images,
        'device': args.device.type,
        'dtype': 'float32',
        'autocast': options.amp_dtype if options.amp else None,
        'batch_size': options.batch_size,
        'rounds': ROUNDS,
    }
    title = format_title(args.recipe.stem, trainings[0].num_epochs, images)

    def write(throughput: dict[str, dict]) -> str:
        results = collect(trainings, variants, throughput)
        record = {'settings': settings, 'variants': results}
        return write_results(args.results, title, format_table(results), record, draw(results, title))

    # on a CPU, workers would compete with the model for the cores
    workers = 0 if args.device.type == 'cpu' else min(MAX_WORKERS, os.cpu_count())
    places |= {'device': str(args.device), 'workers': workers, 'checkpoint_hist': 1}
    try:
        train_all(trainings, script, places, lock, lambda: write({}))
    except KeyboardInterrupt:
        raise SystemExit('\nThe run was interrupted. The same command continues it.') from None
    print(f'\n{write(measure_throughput(entries, variants, settings))}')


if __name__ == '__main__':
    main()
