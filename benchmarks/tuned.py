""" `timm-evo tune` as a user gives it, and how fast the model is with the settings that it finds

    python benchmarks/tuned.py --checkpoint deit_tiny.safetensors --images imagenet-sample-images \
        --results benchmarks/results/tuned_deit_tiny_cpu

The results have what the command printed, how long it took, and the curve that it drew. Afterwards the model with the
settings is measured again, beside the dense model, batch by batch in turn.
"""
import argparse
import io
import json
import statistics
import time
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from common.arguments import positive_int
from common.environment import describe_environment, summarise_environment
from common.measuring import Step, time_step
from common.report import write_report
from common.results import add_results, replacing
from tqdm import tqdm

import timm_evo
from timm_evo import cli

BATCH_SIZE, ROUNDS = 16, 15


def tune(args: argparse.Namespace) -> tuple[str, dict, bytes]:
    """What the command prints, the settings, and the curve."""
    checkpoint = ['--checkpoint', str(args.checkpoint)] if args.checkpoint else []
    output = io.StringIO()
    with TemporaryDirectory() as folder:
        settings = Path(folder, 'tuned.json')
        with redirect_stdout(output):
            cli.main(['tune', args.model, *checkpoint, '--images', str(args.images), '--speedup', str(args.speedup),
                      '--save', str(settings)])
        printed = output.getvalue().replace(f'{settings.parent}/', '')
        if not settings.is_file():
            raise SystemExit(printed)
        return printed, json.loads(settings.read_text()), settings.with_suffix('.png').read_bytes()


def measure_again(model: str, settings: dict, repeats: int) -> list[float]:
    """Throughput over that of the dense model, several times. It does not depend on the weights."""
    dense = timm.create_model(model).eval()
    evolved = timm_evo.evolve(timm.create_model(model), **settings).eval()
    images = torch.randn(BATCH_SIZE, *timm.data.resolve_data_config(model=dense)['input_size'])
    steps = [Step(x, images, False, None, None) for x in (dense, evolved)]
    for step in steps:
        step()
    ratios = []
    for _ in tqdm(range(repeats), desc='measured again'):
        times = [[time_step(step) for step in steps] for _ in range(ROUNDS)]
        of_dense, of_evolved = map(statistics.median, zip(*times, strict=True))
        ratios.append(of_dense / of_evolved)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description='`timm-evo tune` as a user gives it, and the speed of what it finds.')
    parser.add_argument('--model', default='deit_tiny_patch16_224', help='a dense ViT of timm (default: %(default)s)')
    parser.add_argument('--checkpoint', type=Path, metavar='FILE', help="its weights (default: timm's)")
    parser.add_argument('--images', required=True, type=Path, metavar='FOLDER', help='folder of images')
    parser.add_argument('--speedup', type=float, default=1.5, help='wanted speed-up (default: %(default)s)')
    parser.add_argument(
        '--repeats', type=positive_int, default=3, help='how often the speed is measured again (default: %(default)s)')
    add_results(parser)
    args = parser.parse_args()

    environment = describe_environment(torch.device('cpu'))
    start = time.perf_counter()
    output, settings, curve = tune(args)
    seconds = time.perf_counter() - start
    ratios = measure_again(args.model, settings, args.repeats)
    again = f'The command took {seconds:.0f} s. Measured again, the model with these settings has ' + ', '.join(
        f'{ratio:.2f} x' for ratio in ratios) + ' of the dense throughput.'
    text = f'`timm-evo tune` with {args.model}\n\n```text\n{output}```\n\n{again}\n\n' \
           f'{summarise_environment(environment)}; float32, batch {BATCH_SIZE}.\n'
    write_report(args.results, text, {
        **environment, 'settings': settings, 'seconds': seconds, 'measured_again': ratios, 'output': output})
    with replacing(args.results.with_name(args.results.name + '.png')) as part:
        part.write_bytes(curve)
    print(text)


if __name__ == '__main__':
    main()
