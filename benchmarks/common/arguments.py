""" Common arguments of the benchmarks """
import argparse
import difflib
from pathlib import Path

import timm
import torch

from timm_evo.cli import key_value

from .measuring import COMPILE_MODES, DTYPES, dense_twin


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, not {value}')
    return value


def timed_device(text: str) -> torch.device:
    """A device as an argument of a command. It becomes the current device, whose events `time_step` records."""
    try:
        device = torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:  # AssertionError if torch has no CUDA
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    if device.type not in ('cpu', 'cuda'):
        raise argparse.ArgumentTypeError(f'only cpu and cuda can be timed, not {device.type}')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    return device


def output_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f'{text!r} is not a file in an existing folder')
    return path


class CollectKwargs(argparse.Action):
    """Collects the results of `key_value` in a dictionary."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, dict(values))


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--device',
        type=timed_device,
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='cpu or cuda (default: cuda if available, otherwise cpu)',
    )


def add_models(parser: argparse.ArgumentParser, default: list[str]) -> None:
    """Add the arguments for the models to run: `--models` and `--model-kwargs`."""
    parser.add_argument(
        '--models',
        nargs='+',
        default=default,
        metavar='NAME',
        help=f'evolved or dense models. The dense twin of each evolved one is added (default: {" ".join(default)})',
    )
    parser.add_argument(
        '--model-kwargs',
        nargs='*',
        type=key_value,
        action=CollectKwargs,
        default={},
        metavar='KEY=VALUE',
        help='arguments of the evolved models, such as keep_ratio=0.7',
    )


def add_how(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for how models run, which `choose_how` reads."""
    add_device(parser)
    parser.add_argument(
        '--dtype', choices=DTYPES, default='float32',
        help='dtype of weights and inputs, without autocast (default: float32)')
    parser.add_argument(
        '--compile',
        nargs='?',
        choices=COMPILE_MODES,
        const='default',
        metavar='MODE',
        help=f'use torch.compile; modes: {", ".join(COMPILE_MODES)}',
    )
    parser.add_argument('--train', action='store_true', help='measure training steps instead of inference')
    parser.add_argument(
        '--channels-last', action='store_true', help='use the memory format channels_last for weights and images')
    parser.add_argument(
        '--reparam', action='store_true',
        help='fuse the layers that timm can fuse for inference: the batch norms of LeViT')
    parser.add_argument('--threads', type=positive_int, metavar='N', help='CPU threads (default: all)')


def parse_and_check(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the arguments of `add_models` and `add_how`, check that they work together, and set the threads."""
    args = parser.parse_args()
    if 'img_size' in args.model_kwargs:
        parser.error('--model-kwargs are for the evolved models only. Use --img-size or --img-sizes.')
    if args.reparam and args.train:
        parser.error('--reparam fuses layers for inference, so it is not allowed with --train')
    known = timm.list_models()
    for name in args.models:
        if name not in known:
            close = difflib.get_close_matches(name, known)
            parser.error(f'timm has no model {name!r}.' + (f' Did you mean {" or ".join(close)}?' if close else ''))
        if dense_twin(name) not in known:
            parser.error(f'{name} has no dense twin in timm. Use another model and another image size.')
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args


def choose_how(args: argparse.Namespace) -> dict:
    """Arguments of `measuring.prepare` without the batch size."""
    return {
        'device': args.device,
        'dtype': DTYPES[args.dtype],
        'train': args.train,
        'compile_mode': args.compile,
        'channels_last': args.channels_last,
        'reparam': args.reparam,
    }


def describe_how(args: argparse.Namespace) -> dict:
    """The settings of `choose_how` for JSON, with the arguments of the evolved models."""
    return {
        **{key: getattr(args, key) for key in ('dtype', 'train', 'compile', 'channels_last', 'reparam')},
        'device': args.device.type,
        'model_kwargs': args.model_kwargs,
    }
