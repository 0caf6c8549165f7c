""" Inference throughput of evolved models and their dense twins

All models run in one process, one batch each per round, in an order that alternates from round to round, so that
whatever else the machine does slows all of them. Ratios are medians of the ratios within each round.

    python benchmarks/throughput.py --models evo_deit_small_patch16_224 --batch-size 32 --output results.json

Weights and inputs are random. `--dtype` casts both, as timm's `benchmark.py --precision` does; there is no autocast.
"""
import argparse
import difflib
import json
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from _environment import describe_environment
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

DEFAULT_MODELS = ['evo_deit_tiny_patch16_224', 'evo_deit_small_patch16_224', 'evo_deit_base_patch16_224']
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
NUM_WARMUP = 3


def dense_twin(name: str) -> str:
    """The dense model that `name` is compared with; a dense model is its own."""
    return name.removeprefix('evo_').replace('levit_cls_', 'levit_')


def with_twins(names: list[str]) -> list[str]:
    """The models to run: each of `names` once, evolved ones right after their dense twins."""
    return list(dict.fromkeys(model for name in names for model in (dense_twin(name), name)))


def build_model(name: str, args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """A model in evaluation mode and a batch for it."""
    kwargs = {} if args.img_size is None else {'img_size': args.img_size}
    if name != dense_twin(name):
        kwargs.update(args.model_kwargs)
    try:
        model = timm.create_model(name, **kwargs).to(args.device, args.dtype).eval()
    except (TypeError, ValueError) as error:
        raise SystemExit(f'{name}: {error}') from error
    channels, height, width = model.pretrained_cfg['input_size']
    if args.img_size is not None:
        height = width = args.img_size
    return model, torch.randn(args.batch_size, channels, height, width, device=args.device, dtype=args.dtype)


@torch.no_grad()  # in inference mode, an older counter sees no linear layer
def measure_cost(model: nn.Module, batch: Tensor) -> dict[str, float]:
    """Multiply-accumulates of one image, and parameters."""
    # an older counter does not know fused attention on a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch[:1])
    return {
        'gmacs': counter.get_total_flops() / 2e9,
        'params': sum(p.numel() for p in model.parameters()),
    }


@torch.inference_mode()
def time_call(function: Callable[[Tensor], Tensor], batch: Tensor) -> float:
    """Seconds that one call takes, on the clock of the device it runs on."""
    if batch.device.type == 'cuda':
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function(batch)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    function(batch)
    return time.perf_counter() - start


def measure(names: list[str], args: argparse.Namespace) -> dict[str, dict]:
    """Cost of each model, and its seconds per batch in each round."""
    built = {name: build_model(name, args) for name in names}
    results = {name: measure_cost(model, batch) for name, (model, batch) in built.items()}
    if args.compile:
        # Static shapes, because models of several sizes share one `forward`, which would turn the sizes dynamic; a full
        # graph, because a break or too many compilations of it would quietly run the rest uncompiled.
        built = {
            name: (torch.compile(model, fullgraph=True, dynamic=False), batch)
            for name, (model, batch) in built.items()
        }

    with tqdm(total=(NUM_WARMUP + args.rounds) * len(names), unit='batch') as progress:
        for name, (model, batch) in built.items():
            progress.set_description(f'warm-up {name}')
            for _ in range(NUM_WARMUP):
                time_call(model, batch)
                progress.update()
            results[name]['seconds'] = []
        progress.set_description('rounds')
        for i in range(args.rounds):
            for name in names if i % 2 == 0 else reversed(names):
                results[name]['seconds'].append(time_call(*built[name]))
                progress.update()
    return results


def summarise(results: dict[str, dict], batch_size: int) -> dict[str, dict]:
    """Medians, quartiles and ratios to the dense twin; larger ratios are faster and cheaper."""
    summary = {}
    for name, result in results.items():
        dense = results[dense_twin(name)]
        seconds = torch.tensor(result['seconds'], dtype=torch.float64)
        dense_seconds = torch.tensor(dense['seconds'], dtype=torch.float64)
        lower, median, upper = seconds.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        summary[name] = {
            'seconds_per_batch': {'lower_quartile': lower, 'median': median, 'upper_quartile': upper},
            'images_per_second': batch_size / median,
            'gmacs': result['gmacs'],
            'params': result['params'],
            'ratio_to_dense': (dense_seconds / seconds).quantile(0.5).item(),
            'flop_ratio_to_dense': dense['gmacs'] / result['gmacs'],
        }
    return summary


def print_table(summary: dict[str, dict]) -> None:
    width = max(len(name) for name in summary) + 2
    print(
        f'\n{"":<{width}}{"img/s":>10}{"ms/batch":>11}{"quartiles":>18}{"ratio":>8}'
        f'{"FLOP ratio":>12}{"GMACs":>9}{"params (M)":>12}'
    )
    for name, row in summary.items():
        seconds = row['seconds_per_batch']
        quartiles = f'{1000 * seconds["lower_quartile"]:.1f}-{1000 * seconds["upper_quartile"]:.1f}'
        print(
            f'{name:<{width}}{row["images_per_second"]:>10.1f}{1000 * seconds["median"]:>11.1f}{quartiles:>18}'
            f'{row["ratio_to_dense"]:>8.2f}{row["flop_ratio_to_dense"]:>12.2f}{row["gmacs"]:>9.3f}'
            f'{row["params"] / 1e6:>12.2f}'
        )


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, not {value}')
    return value


def key_value(text: str) -> str:
    if '=' not in text:
        raise argparse.ArgumentTypeError(f'{text!r} is not key=value')
    return text


def timed_device(text: str) -> torch.device:
    try:
        device = torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # AssertionError where torch has no CUDA
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    if device.type not in ('cpu', 'cuda'):
        raise argparse.ArgumentTypeError(f'only cpu and cuda can be timed, not {device.type}')
    return device


def output_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f'{text!r} is not a file in an existing folder')
    return path


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """Arguments, and the models to run."""
    parser = argparse.ArgumentParser(description='Inference throughput of evolved models and their dense twins.')
    parser.add_argument(
        '--models',
        nargs='+',
        default=DEFAULT_MODELS,
        metavar='NAME',
        help='evolved or dense models; the dense twin of each evolved one is added (default: evolved DeiT-T, -S, -B)',
    )
    parser.add_argument(
        '--device',
        type=timed_device,
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='cpu or cuda (default: cuda if there is one, else cpu)',
    )
    parser.add_argument(
        '--dtype', choices=DTYPES, default='float32', help='of weights and inputs, by plain cast (default: float32)')
    parser.add_argument('--compile', action='store_true', help='use torch.compile')
    parser.add_argument('--batch-size', type=positive_int, default=16, metavar='N', help='images (default: 16)')
    parser.add_argument('--img-size', type=positive_int, metavar='N', help="image size (default: each model's own)")
    parser.add_argument('--threads', type=positive_int, metavar='N', help='CPU threads (default: all)')
    parser.add_argument('--rounds', type=positive_int, default=11, metavar='N', help='timed rounds (default: 11)')
    parser.add_argument(
        '--model-kwargs',
        nargs='*',
        type=key_value,
        action=ParseKwargs,
        default={},
        metavar='KEY=VALUE',
        help='arguments of the evolved models, such as keep_ratio=0.7',
    )
    parser.add_argument('--output', type=output_file, metavar='FILE', help='write the results here, as JSON')
    args = parser.parse_args()
    args.dtype = DTYPES[args.dtype]

    known = timm.list_models()
    for name in args.models:
        if name not in known:
            close = difflib.get_close_matches(name, known)
            parser.error(f'unknown model {name!r}' + (f', did you mean {" or ".join(close)}?' if close else ''))
        if dense_twin(name) not in known:
            parser.error(f'{name} has no dense twin in timm, use another model and --img-size')
    return args, with_twins(args.models)


def main() -> None:
    args, names = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device.type == 'cuda':
        torch.cuda.set_device(args.device)
    summary = summarise(measure(names, args), args.batch_size)
    print_table(summary)

    if args.output is not None:
        record = describe_environment()
        record['machine']['threads'] = torch.get_num_threads()
        if args.device.type == 'cuda':
            record['machine']['gpu'] = torch.cuda.get_device_name()
        settings = {
            'device': args.device.type,
            'dtype': str(args.dtype).removeprefix('torch.'),
            'compile': args.compile,
            'batch_size': args.batch_size,
            'img_size': args.img_size,
            'rounds': args.rounds,
            'model_kwargs': args.model_kwargs,
        }
        args.output.write_text(json.dumps({**record, 'settings': settings, 'models': summary}, indent=2) + '\n')


if __name__ == '__main__':
    main()
