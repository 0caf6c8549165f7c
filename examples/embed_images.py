""" Features and predictions of many images, by Ray Data: python examples/embed_images.py --data images --output out ...

The same command continues an earlier run, also after a failure. Images in complete files of OUTPUT/features are left
out. RAY_ADDRESS is the address of the cluster. Without it, Ray starts only on this machine.
"""
import argparse
import hashlib
import io
import json
import logging
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import timm
import torch
from filelock import FileLock, Timeout
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils import ParseKwargs, random_seed

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--data', nargs='+', required=True, help='folders of images, at any depth, or .parquet files')
for name, default, text in [
        ('output', None, 'a folder that all machines share'), ('model', None, 'name in timm, or hf-hub:OWNER/NAME'),
        ('checkpoint', '', 'a file of weights'), ('batch-size', 256, 'number of images in a batch'),
        ('save-every', 4096, 'least number of images in a file; only images in files are kept after an interruption'),
        ('actors', 0, 'number of models that run; 0 is one per GPU, or one per machine if there is no GPU'),
        ('image-column', 'image', 'column of .parquet files with bytes or {bytes, path}'),
        ('id-column', '', 'column of .parquet files with ids; without it, ids are path and hash of the row')]:
    parser.add_argument(
        f'--{name}', type=str if default is None else type(default), default=default, required=default is None,
        help=text + (f' (default: {default})' if default else ''))
parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE')
for name, text in [('pretrained', 'load weights of the Hub'), ('bfloat16', 'autocast'), ('compile', 'torch.compile')]:
    parser.add_argument(f'--{name}', action='store_true', help=text)
CAN_CHANGE = {'output', 'batch_size', 'save_every', 'actors', 'compile'}  # when a run is continued
IDS = pa.large_string()
DISK = 0.25  # CPUs for reading or writing. With 1 each, two CPUs would not suffice, and files would be written last


def decode(table: pa.Table, transform, column: str, id_columns: list[str], done: ray.ObjectRef, unreadable: Path):
    """Pixels of the images that are not embedded yet. Names of unreadable images are written to a file."""
    ids, contents = join_ids(table.select(id_columns)), table[column]
    contents = pc.struct_field(contents, 'bytes') if pa.types.is_struct(contents.type) else contents
    to_do, good, images, bad = pc.invert(pc.is_in(ids, value_set=ray.get(done))), [], [], {}
    for name, content in zip(ids.filter(to_do).to_pylist(), contents.filter(to_do).to_pylist(), strict=True):
        try:
            images.append(transform(Image.open(io.BytesIO(content)).convert('RGB')).numpy())
            good.append(name)
        except Exception as error:  # Pillow's decoders raise many kinds of errors
            bad[name] = f'{type(error).__name__}: {str(error).split(" <")[0]}'
    if bad:  # the name is a hash of the content, so that a task that runs again writes the same file
        (unreadable / f'{hashlib.sha256("".join(bad).encode()).hexdigest()}.json').write_text(json.dumps(bad))
    if good:
        yield {'id': np.array(good), 'image': np.stack(images)}


class Embed:
    """A model in an actor. It normalises pixels, which it gets as bytes, because floats are four times as large."""

    def __init__(self, model: ray.ObjectRef, config: dict, threads: int, bfloat16: bool, compiled: bool) -> None:
        torch.set_num_threads(threads)
        self.device = 'cuda' if ray.get_gpu_ids() else 'cpu'
        self.model, self.bfloat16 = ray.get(model).to(self.device), bfloat16
        self.mean, self.std = (torch.tensor(config[key], device=self.device)[:, None, None] for key in ('mean', 'std'))
        self.run = torch.compile(self.forward) if compiled else self.forward

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens = self.model.forward_features(images)
        logits = self.model.forward_head(tokens).float() if self.model.num_classes else None
        return self.model.forward_head(tokens, pre_logits=True).float(), logits

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        images = torch.tensor(batch['image'], device=self.device).float().div(255).sub(self.mean).div(self.std)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
            features, logits = self.run(images)
        values = pa.array(features.flatten().cpu().numpy())
        columns = {'id': batch['id'], 'features': pa.FixedSizeListArray.from_arrays(values, features.shape[1])}
        if logits is not None:
            probability, prediction = logits.softmax(-1).max(-1)
            columns |= {'prediction': prediction.cpu().numpy(), 'probability': probability.cpu().numpy()}
        return pa.table(columns)


def join_ids(columns: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(*(column.cast(IDS) for column in columns.columns), pa.scalar('#', IDS))


def read_done(folder: Path) -> pa.ChunkedArray:
    """The ids in complete files. An incomplete file has no footer and is deleted."""
    ids = []
    for file in sorted(folder.glob('*.parquet')):
        try:
            ids += pq.ParquetFile(file).read(['id'])['id'].cast(IDS).chunks
        except pa.ArrowInvalid:
            file.unlink()
    return pa.chunked_array(ids, IDS)


def find_images(args: argparse.Namespace) -> tuple[pa.ChunkedArray | None, int]:
    """The ids, or None if they are made during reading, and the number of images."""
    folders = all(os.path.isdir(path) for path in args.data)
    for path in args.data:
        if not (folders or path.endswith('.parquet') and os.path.isfile(path)):
            parser.error(f'--data must be folders, or .parquet files that exist, but {path} is neither')
    if folders:
        found = [find_images_and_targets(os.path.abspath(path))[0] for path in args.data]
        ids = pa.chunked_array([[path for path, _ in each] for each in found], IDS)
        return require_unique('--data', ids), len(ids)
    for path in args.data:
        schema = pq.read_schema(path)
        for option, column in [('image', args.image_column), ('id', args.id_column)]:
            if column and column not in schema.names:
                parser.error(f'--{option}-column must be one of {", ".join(schema.names)} of {path}, not {column}')
        kind = schema.field(args.image_column).type
        if pa.types.is_struct(kind) and kind.get_field_index('bytes') >= 0:
            kind = kind.field('bytes').type
        if kind not in (pa.binary(), pa.large_binary()):
            parser.error(f'--image-column must have bytes or {{bytes, path}}, but {args.image_column} has {kind}')
    require_unique('--data', pa.chunked_array([[os.path.abspath(path) for path in args.data]], IDS))
    if not args.id_column:
        return None, sum(pq.read_metadata(path).num_rows for path in args.data)
    names = pa.concat_tables(pq.ParquetFile(path).read([args.id_column]) for path in args.data)[0].cast(IDS)
    return require_unique('--id-column', names), len(names)


def require_unique(option: str, ids: pa.ChunkedArray) -> pa.ChunkedArray:
    if ids.null_count or len(pc.unique(ids)) < len(ids):
        twice = next((str(each['values']) for each in pc.value_counts(ids) if each['counts'].as_py() > 1), 'null')
        parser.error(f'{option} must have each id once, but it has {twice} more than once')
    return ids


def check_settings(args: argparse.Namespace, more: dict) -> None:
    """Write the settings, or exit if they differ from those of the earlier run."""
    settings = {name: value for name, value in vars(args).items() if name not in CAN_CHANGE} | more
    settings, file = json.loads(json.dumps(settings)), args.output / 'settings.json'
    if file.exists():
        for name, value in json.loads(file.read_text()).items():
            if settings.get(name) != value:
                raise SystemExit(f'{file} has {name} = {value}, not {settings.get(name)}. Use another --output.')
    elif args.output.exists() and any(args.output.iterdir()):
        parser.error(f'--output must be new, empty, or of an earlier run, but {args.output} is not')
    (args.output / 'features').mkdir(parents=True, exist_ok=True)
    file.with_suffix('.part').write_text(json.dumps(settings, indent=2))
    file.with_suffix('.part').rename(file)


def plan_actors(actors: int) -> tuple[int, int, dict]:
    """The number of actors, the threads of each, and the resources that each asks Ray for.

    An actor asks for almost no CPU. If a machine is lost, Ray starts its actors on the others. If they took the last
    CPU there, no task could read, decode or write. The number of threads leaves a fifth of the CPUs for these tasks.
    (If actors asked for no CPU at all, Ray would not spread them.)
    """
    gpus = int(ray.cluster_resources().get('GPU', 0))
    cpus = [int(node['Resources'].get('CPU', 0)) for node in ray.nodes() if node['Alive']]
    cpus = [count for count in cpus if count > 1]
    actors, most = actors or gpus or len(cpus), gpus or sum(cpus)
    if not 1 <= actors <= most:
        parser.error(f'--actors must be at most {most} (GPUs, or CPUs where there are two or more), not {actors}')
    threads = min(cpus, default=1) * 4 // 5 // math.ceil(actors / max(1, len(cpus)))
    return actors, max(1, threads), {'num_cpus': 0.01, 'num_gpus': 1 if gpus else None}


def embed(args: argparse.Namespace, ids: pa.ChunkedArray | None, done: pa.ChunkedArray, number: int,
          model: torch.nn.Module, config: dict) -> None:
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    os.environ.setdefault('RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO', '0')  # no warning that does not matter here
    os.environ.setdefault('RAY_DATA_NON_TTY_PROGRESS_LOG_INTERVAL', '30')  # seconds
    # idle processes to keep; with one per CPU they end too soon, and each new process needs seconds to import timm
    os.environ.setdefault('RAY_num_workers_soft_limit', str((os.cpu_count() or 1) + 4))
    single = os.cpu_count() == 1 and os.environ.get('RAY_ADDRESS', 'local') == 'local'  # tasks and a model need two
    ray.init(include_dashboard=False, logging_level=logging.WARNING, num_cpus=2 if single else None)
    actors, threads, resources = plan_actors(args.actors)
    blocks, parquet = -(-number // args.batch_size), args.data[0].endswith('.parquet')
    context = ray.data.DataContext.get_current()
    context.enable_rich_progress_bars, context.use_ray_tqdm = True, False  # others are not visible in a terminal
    if parquet:
        context.use_datasource_v2 = False  # its threads sometimes fail during an import
        unnamed = not args.id_column
        columns = [args.image_column, *([args.id_column] if args.id_column else [])]
        images = ray.data.read_parquet(
            args.data, columns=columns, partitioning=None, include_paths=unnamed, include_row_hash=unnamed,
            override_num_blocks=blocks, num_cpus=DISK)
        columns = [args.image_column, ['path', 'row_hash'] if unnamed else [args.id_column]]
    else:
        files = ids.filter(pc.invert(pc.is_in(ids, value_set=done))).to_pylist()
        images = ray.data.read_binary_files(files, include_paths=True, override_num_blocks=blocks, num_cpus=DISK)
        columns = ['bytes', ['path']]
    transform = create_transform(**config, use_prefetcher=True)  # it gives bytes, and the actor converts them to floats
    images = images.map_batches(
        decode, fn_args=[transform, *columns, ray.put(done), args.output / 'unreadable'], batch_size=args.batch_size,
        batch_format='pyarrow')
    images = images.repartition(target_num_rows_per_block=args.batch_size)  # to decode outside the actor
    embedded = images.map_batches(
        Embed, fn_constructor_args=[ray.put(model), config, threads, args.bfloat16, args.compile],
        batch_size=args.batch_size, compute=ray.data.ActorPoolStrategy(size=actors), **resources)
    embedded.write_parquet(
        str(args.output / 'features'), min_rows_per_file=args.save_every, ray_remote_args={'num_cpus': DISK})
    ray.shutdown()


def main() -> None:
    args = parser.parse_args()
    for option, least in [('batch_size', 1), ('save_every', 1), ('actors', 0)]:
        if getattr(args, option) < least:
            parser.error(f'--{option.replace("_", "-")} must be at least {least}, not {getattr(args, option)}')
    args.output, unreadable = Path(args.output).absolute(), Path(args.output).absolute() / 'unreadable'
    ids, number = find_images(args)
    if not number:
        parser.error(f'--data must have images, but there are none in {" ".join(args.data)}')
    args.data = [os.path.abspath(path) for path in args.data]
    random_seed(0)  # so that weights that are not loaded are the same in each run
    model = timm.create_model(args.model, args.pretrained, checkpoint_path=args.checkpoint, **args.model_kwargs).eval()
    config, weights = resolve_data_config(args.model_kwargs, model=model), hashlib.sha256()
    for weight in model.state_dict().values():
        weights.update(weight.double().numpy().tobytes())
    check_settings(args, {'transform': config, 'weights': weights.hexdigest()})
    lock = FileLock(args.output / 'lock')
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SystemExit(f'{args.output} is in use by another run.') from None
    shutil.rmtree(unreadable, ignore_errors=True)  # unreadable images are tried again
    unreadable.mkdir()
    done = read_done(args.output / 'features')
    print(f'{number} images, of which {len(done)} are done', flush=True)
    if len(done) < number:
        embed(args, ids, done, number - len(done), model, config)
        done = read_done(args.output / 'features')
    bad = {}
    for file in unreadable.glob('*.json'):
        bad |= json.loads(file.read_text())
    lines = [f'{name}\t{why}\n' for name, why in sorted(bad.items())]
    (args.output / 'unreadable.txt').write_text(''.join(lines))
    print(''.join(f'unreadable: {line}' for line in lines), end='')
    print(f'{len(done)} images are in {args.output / "features"}, {len(bad)} are unreadable')
    found = done if ids is None else ids.filter(pc.is_in(ids, value_set=done))
    twice, lost = len(done) - len(pc.unique(done)), number - len(bad) - len(found)
    if twice or lost > 0:
        raise SystemExit(f'{twice} images were written twice, and {lost} are missing: an error in this script or Ray')


if __name__ == '__main__':
    main()
