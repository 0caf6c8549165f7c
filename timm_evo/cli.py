""" The `timm-evo` command

Each command calls the library, which is imported only when the command runs, so that `--help` is fast.
"""
import argparse
import ast
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PICTURES = ('.png', '.pdf', '.svg')
PAGE = '.html'
_PICTURES = f'{", ".join(PICTURES[:-1])} or {PICTURES[-1]}'


def _convert(args: argparse.Namespace) -> None:
    from huggingface_hub.utils import tqdm

    from . import checkpoints, hub
    from .errors import reason

    hub.check_free(args.output, args.force)  # before any work
    with tqdm(total=3 if args.push else 2, desc='load and convert', unit='step') as progress:
        state_dict = checkpoints.read_official(args.checkpoint, use_ema=args.use_ema)
        model, model_args = checkpoints.build_official(state_dict, args.model, dict(args.model_kwargs))
        progress.update()
        progress.set_description('write')
        hub.save(model, args.output, model_args=model_args, force=args.force)
        progress.update()
        if args.push:
            progress.set_description('push')
            try:
                hub.push(model, args.push, model_args=model_args)
            except Exception as error:  # huggingface_hub raises many types without a connection or a token
                raise OSError(
                    f'{args.output} was written, but not pushed to {args.push}. {reason(error)}') from error
            progress.update()
    print(f"timm.create_model('local-dir:{args.output}', pretrained=True)")
    if args.push:
        print(f"timm.create_model('hf-hub:{args.push}', pretrained=True)")


def _info(args: argparse.Namespace) -> None:
    from .inspection import info

    print(info.summarise(args.model, **dict(args.model_kwargs)))


def _check_can_be_file(option: str, file: Path) -> None:
    """Refuse a file that could not be written, before any work."""
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f'{option} {file} cannot be written: there is no folder {file.parent}.')
    if file.is_dir():
        raise IsADirectoryError(f'{option} {file} is a folder. It must be a file.')


def _visualize(args: argparse.Namespace) -> None:
    suffix = args.output.suffix.lower()
    if suffix not in (PAGE, *PICTURES):
        raise ValueError(f'--output {args.output} is not allowed. It must end with {PAGE}, {_PICTURES}.')
    _check_can_be_file('--output', args.output)
    if args.keep_ratios and suffix != PAGE:
        raise ValueError(
            f'--keep-ratios is for a page ({PAGE}), but --output {args.output} is a picture of one keep ratio.')

    from . import checkpoints
    from .inspection import building, prediction, visualization

    if suffix != PAGE:
        visualization.figure_class()  # an error before weights are loaded
    image = visualization.open_photo(args.image)
    classes = None if args.classes is None else prediction.read_classes(args.classes)
    model = building.build(args.model, dict(args.model_kwargs), pretrained=args.checkpoint is None)
    if args.checkpoint is not None:
        checkpoints.load_weights(model, args.checkpoint)
    if suffix == PAGE:
        keep_ratios = args.keep_ratios or visualization.KEEP_RATIOS
        visualization.write_page(args.output, image, model, keep_ratios, classes)
    else:
        visualization.visualize(image, model, classes).savefig(args.output, dpi=150)
    print(args.output)


def _tune(args: argparse.Namespace) -> None:
    if args.save is not None and args.plot is None and find_spec('matplotlib') is not None:
        args.plot = args.save.with_suffix('.png')
    if args.plot is not None and args.plot.suffix.lower() not in PICTURES:
        raise ValueError(f'--plot {args.plot} is not allowed. It must end with {_PICTURES}.')
    for option, file in (('--save', args.save), ('--plot', args.plot)):
        if file is not None:
            _check_can_be_file(option, file)

    import torch

    from . import checkpoints
    from .errors import reason
    from .inspection import building, visualization
    from .tuning import folder, tune

    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:  # torch raises either if there is no such device
        raise ValueError(f'--device {args.device} is not available. {reason(error)}') from error
    if args.plot is not None:
        visualization.figure_class()  # an error before any work
    model = building.build(args.model, dict(args.model_kwargs), pretrained=args.checkpoint is None)
    if args.checkpoint is not None:
        checkpoints.load_weights(model, args.checkpoint)
    images, labels = folder.load_images(args.images, model, args.num_images)
    wishes = dict(speedup=args.speedup, agreement=args.agreement, keep_ratio=args.keep_ratio)
    try:
        tuned = tune.tune(
            model.to(args.device), images, labels, **wishes, batch_size=args.batch_size, compile=args.compile,
            save=args.save)
    except KeyboardInterrupt:
        sys.exit('timm-evo was interrupted.' + ('' if args.save is None else ' The same command continues.'))
    print(tuned)
    if args.plot is not None:
        tuned.draw().savefig(args.plot, dpi=150)
        print(f'The curve is in {args.plot}.')
    if tuned.settings is not None:
        if args.save is not None:
            print(f'The settings are in {args.save}.')
        print(f'--model-kwargs {tuned.model_kwargs}')


def key_value(text: str) -> tuple[str, Any]:
    """Name and value of an argument, as timm's scripts read them; in an older timm, those fail for some values."""
    key, equals, value = text.partition('=')
    if not equals:
        raise argparse.ArgumentTypeError(f'{text!r} is not of the form KEY=VALUE')
    try:
        return key, ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all types that it may raise
        return key, value


def _add_model_kwargs(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument('--model-kwargs', nargs='*', type=key_value, default=[], metavar='KEY=VALUE', help=help)


def _parse_args(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='timm-evo',
        description="Token evolution for timm's vision transformers. `info` prints the settings, the cost and the "
                    'tokens of an evo_* model. `tune` finds the settings that keep most of a model, dense or evo_*, on '
                    'your images. `visualize` draws which patches of a photo a model, dense or evo_*, selects or '
                    "averages. `convert` converts a checkpoint of Evo-ViT's authors to an evo_* model.",
    )
    versions = ', '.join(f'{name} {version(name)}' for name in ('timm-evo', 'timm', 'torch'))
    parser.add_argument('--version', action='version', version=versions)
    commands = parser.add_subparsers(title='commands', required=True, metavar='COMMAND')

    info = commands.add_parser(
        'info',
        help='print settings, cost, tokens of each block and weights of an evo_* model',
        description='Print the settings, the cost, the tokens of each block and the origin of the weights of an evo_* '
                    'model. Nothing is downloaded.',
    )
    info.set_defaults(command=_info)
    info.add_argument('model', metavar='MODEL', help='name of an evo_* model')
    _add_model_kwargs(info, 'arguments of the model, such as keep_ratio=0.7 or img_size=384')

    visualize = commands.add_parser(
        'visualize',
        help='draw which patches of a photo a model selects or averages',
        description='Draw which patches of a photo a model selects or averages, with the predictions of the dense and '
                    'of the evolved model. The output is a picture with all selections, or a page with sliders for '
                    'block and keep ratio. A dense model is evolved for this.',
    )
    visualize.set_defaults(command=_visualize)
    visualize.add_argument('image', type=Path, metavar='IMAGE', help='file of the photo')
    visualize.add_argument(
        '--model', required=True, metavar='NAME',
        help='name of a ViT or LeViT of timm, dense or evo_*, or hf-hub:user/name')
    visualize.add_argument(
        '--checkpoint', type=Path, metavar='FILE',
        help='file with the weights (default: the pretrained ones of the Hub)')
    _add_model_kwargs(visualize, 'arguments of the model and of evolution, such as img_size=384 or keep_ratio=0.7')
    visualize.add_argument(
        '--keep-ratios', nargs='+', type=float, metavar='RATIO',
        help='keep ratios of a page (default: 0.3 0.5 0.7 0.9)')
    visualize.add_argument(
        '--classes', type=Path, metavar='FILE',
        help="text file with the names of the model's classes, one per line (default: the names of ImageNet's "
             'classes, if the model has as many classes)')
    visualize.add_argument(
        '--output', required=True, type=Path, metavar='FILE',
        help=f'file to write: {PAGE} for a page, or {_PICTURES} for a picture')

    tune = commands.add_parser(
        'tune',
        help='find the settings that keep most of a model on your images',
        description="Find the settings of selection='similarity' that keep most of a model on a folder of images, at "
                    'the speed-up, the agreement or the keep ratio that you want. First, several keep ratios are '
                    'measured. Then the best schedule is searched for. Nothing is trained.',
    )
    tune.set_defaults(command=_tune)
    tune.add_argument('model', metavar='MODEL', help='name of a ViT of timm, dense or evo_*, or hf-hub:user/name')
    tune.add_argument(
        '--images', required=True, type=Path, metavar='FOLDER',
        help='folder of images like those that the model will be used for. If it has one folder per class of the '
             'model, top-1 is measured, too')
    tune.add_argument(
        '--num-images', type=int, default=200, metavar='N',
        help='number of images to use, evenly spread over the folder (default: 200)')
    tune.add_argument(
        '--checkpoint', type=Path, metavar='FILE',
        help='file with the weights (default: the pretrained ones of the Hub)')
    _add_model_kwargs(tune, 'arguments of the model, such as img_size=384. Those of evolution are ignored')
    wish = tune.add_mutually_exclusive_group()
    wish.add_argument('--speedup', type=float, metavar='X', help='wanted speed-up over the dense model (default: 1.5)')
    wish.add_argument(
        '--agreement', type=float, metavar='SHARE',
        help='wanted share of the images that keep their class, or cosine of the features of a backbone')
    wish.add_argument(
        '--keep-ratio', type=float, metavar='RATIO', help='wanted cost, as the keep ratio that has this cost')
    tune.add_argument(
        '--batch-size', type=int, default=16, metavar='N', help='number of images in a batch (default: 16)')
    tune.add_argument('--device', default='cpu', help='device on which the model runs (default: cpu)')
    tune.add_argument('--compile', action='store_true', help='measure the speed of compiled models')
    tune.add_argument(
        '--save', type=Path, metavar='FILE.json',
        help='write the settings to this file, and the curve to FILE.png if matplotlib is installed. Measurements are '
             'written to FILE.measured.json, with which the same command continues after an interruption')
    tune.add_argument('--plot', type=Path, metavar='FILE', help='file for the curve (default: FILE.png of --save)')

    convert = commands.add_parser(
        'convert',
        help="convert a checkpoint of Evo-ViT's authors to an evo_* model",
        description="Convert a checkpoint of Evo-ViT's authors to a folder with config.json, model.safetensors and "
                    'README.md. timm.create_model loads it as local-dir:DIR. No code in the checkpoint is run.',
    )
    convert.set_defaults(command=_convert)
    convert.add_argument('checkpoint', type=Path, metavar='CHECKPOINT', help='.pth or .safetensors file of the authors')
    convert.add_argument(
        '--model', required=True, metavar='NAME',
        help='name of an evo_deit_* or evo_levit_cls_* model of the same size')
    convert.add_argument('--output', required=True, type=Path, metavar='DIR', help='folder to write')
    _add_model_kwargs(
        convert, 'arguments that differ from those of the published models, such as img_size=384 or selection=layer')
    convert.add_argument('--use-ema', action='store_true', help='use the averaged weights (model_ema)')
    convert.add_argument('--push', metavar='USER/NAME', help='push to this repository of the Hugging Face Hub, too')
    convert.add_argument('--force', action='store_true', help='replace the model in DIR')
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> None:
    """Run the `timm-evo` command. An error that the user can correct ends it with one message.

    Functions that read names, arguments and files of the user convert the errors of other libraries to the types below.
    An error of another type is a mistake in this package, and its traceback is shown.
    """
    parsed = _parse_args(args)
    try:
        parsed.command(parsed)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f'timm-evo: {error}')
