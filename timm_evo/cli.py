""" The `timm-evo` command

Each sub-command is a thin call into the library, which is imported when it is needed: `--help` answers at once.
"""
import argparse
import ast
import sys
from pathlib import Path
from typing import Any


def _convert(args: argparse.Namespace) -> None:
    from huggingface_hub.utils import tqdm

    from . import checkpoints, hub

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
            except Exception as error:  # whatever the libraries below raise without a connection or a token
                raise RuntimeError(
                    f'{args.output} was written, but not pushed to {args.push}. {type(error).__name__}: {error}'
                ) from error
            progress.update()
    print(f"timm.create_model('local-dir:{args.output}', pretrained=True)")
    if args.push:
        print(f"timm.create_model('hf-hub:{args.push}', pretrained=True)")


def key_value(text: str) -> tuple[str, Any]:
    """Name and value of an argument, as timm's scripts read them; an older timm's own fails at some values."""
    key, equals, value = text.partition('=')
    if not equals:
        raise argparse.ArgumentTypeError(f'{text!r} is not key=value')
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _parse_args(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='timm-evo', description="Token evolution for timm's vision transformers.")
    commands = parser.add_subparsers(title='commands', required=True, metavar='COMMAND')

    convert = commands.add_parser(
        'convert',
        help="make a model of timm from a checkpoint of Evo-ViT's authors",
        description="Make a model of timm from a checkpoint of Evo-ViT's authors: a folder with config.json, "
                    'model.safetensors and README.md, which timm.create_model loads as local-dir:DIR. Nothing that is '
                    'pickled in the checkpoint is run.',
    )
    convert.set_defaults(command=_convert)
    convert.add_argument('checkpoint', type=Path, metavar='CHECKPOINT', help='.pth or .safetensors file of the authors')
    convert.add_argument(
        '--model', required=True, metavar='NAME', help='evo_deit_* or evo_levit_cls_* model of the same size')
    convert.add_argument('--output', required=True, type=Path, metavar='DIR', help='folder to write')
    convert.add_argument(
        '--model-kwargs',
        nargs='*',
        type=key_value,
        default=[],
        metavar='KEY=VALUE',
        help='arguments that differ from the published models, such as img_size=384 or selection=layer',
    )
    convert.add_argument('--use-ema', action='store_true', help='take the averaged weights, model_ema')
    convert.add_argument('--push', metavar='USER/NAME', help='push to this repository of the Hugging Face Hub, too')
    convert.add_argument('--force', action='store_true', help='replace a model that DIR has in it')
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> None:
    """Run the `timm-evo` command; an error that the user can mend ends it with one message."""
    parsed = _parse_args(args)
    try:
        parsed.command(parsed)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f'timm-evo: {error}')


if __name__ == '__main__':
    main()
