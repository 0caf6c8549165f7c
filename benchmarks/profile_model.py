""" Where the time of a model goes, beside its dense twin

    python benchmarks/profile_model.py --models evo_deit_small_patch16_224 --results before

Profiles a few steps with torch.profiler and writes the operators, or on CUDA the kernels, that take most of the time,
with how many operators PyTorch has called and how many kernels the CPU has launched. All figures are per step. What
the profiler itself costs is in the times, so take those of `throughput.py` for ratios.
"""
import argparse
import re

import torch
from _arguments import add_how, add_models, choose_how, describe_how, parse_and_check, positive_int
from _environment import describe_environment, summarise_environment
from _measuring import NUM_WARMUP, Step, prepare, with_twins
from _report import write_report
from _results import add_results, markdown_table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

DEFAULT_MODELS = ['evo_deit_small_patch16_224']
# a CUDA graph is one launch for all its kernels
LAUNCH = re.compile(r'cu(da)?(Launch(Cooperative)?Kernel|GraphLaunch)')
MAX_NAME = 90  # names of kernels can be thousands of letters long


def profile_steps(step: Step, num_steps: int) -> dict:
    """Time by operator on a CPU, by kernel on CUDA, and numbers of calls, all per step."""
    on_cuda = step.batch.device.type == 'cuda'
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(num_steps):
            step()
        if on_cuda:
            torch.cuda.synchronize()
    events = profiler.key_averages()
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    if on_cuda:  # without ranges that someone has named: the kernels in them count for themselves
        kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
        times = [(event.self_device_time_total, event.count, event.key) for event in kernels]
    else:
        times = [(event.self_cpu_time_total, event.count, event.key) for event in on_cpu]
    total = sum(microseconds for microseconds, _, _ in times)
    if not total:
        raise SystemExit('torch.profiler has recorded nothing, is another profiler running?')
    return {
        'ms': total / 1000 / num_steps,
        'operator_calls': sum(event.count for event in on_cpu if event.key.startswith('aten::')) / num_steps,
        'kernel_launches': sum(event.count for event in on_cpu if LAUNCH.match(event.key)) / num_steps,
        'operators': [
            {
                'name': name,
                'self_ms': microseconds / 1000 / num_steps,
                'share': microseconds / total,
                'calls': count / num_steps,
            }
            for microseconds, count, name in sorted(times, reverse=True) if microseconds > 0
        ],
    }


def format_text(results: dict[str, dict], num_top: int, on_cuda: bool, title: str) -> str:
    """Markdown: totals of all models, and the most expensive operators or kernels of each."""
    header = ['model', 'ms', 'operator calls', *['kernel launches'] * on_cuda]
    lines = []
    for label, result in results.items():
        launches = [f'{result["kernel_launches"]:.0f}'] * on_cuda
        lines.append([label, f'{result["ms"]:.2f}', f'{result["operator_calls"]:.0f}', *launches])
    text = f'{title}\n\n{markdown_table(header, lines)}\nOperator calls: of ATen, those by other operators included.\n'
    header = ['kernel' if on_cuda else 'operator', 'self ms', 'share', 'calls']
    for label, result in results.items():
        lines = [
            [
                f'`{operator["name"][:MAX_NAME]}`',
                f'{operator["self_ms"]:.3f}',
                f'{operator["share"]:.1%}',
                f'{operator["calls"]:g}',
            ]
            for operator in result['operators'][:num_top]
        ]
        text += f'\n{label}\n\n{markdown_table(header, lines)}'
    return text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Where the time of evolved models goes, beside their dense twins.')
    add_models(parser, DEFAULT_MODELS)
    add_how(parser)
    parser.add_argument('--batch-size', type=positive_int, default=16, metavar='N', help='images (default: 16)')
    parser.add_argument('--img-size', type=positive_int, metavar='N', help="image size (default: each model's own)")
    parser.add_argument('--steps', type=positive_int, default=5, metavar='N', help='profiled steps (default: 5)')
    parser.add_argument(
        '--top', type=positive_int, default=15, metavar='N', help='operators in the tables; JSON has all (default: 15)')
    add_results(parser, ('.json', '.md'))
    return parse_and_check(parser)


def main() -> None:
    args = parse_args()
    variants = with_twins(args.models, args.img_size, args.model_kwargs)
    steps, results = prepare(variants, batch_size=args.batch_size, **choose_how(args))
    with tqdm(steps.items(), unit='model') as progress:
        for label, step in progress:
            progress.set_description(label)
            for _ in range(NUM_WARMUP):
                step()
            results[label] |= profile_steps(step, args.steps)

    environment = describe_environment(args.device)
    settings = {
        **describe_how(args), 'batch_size': args.batch_size, 'img_size': args.img_size, 'steps': args.steps}
    what = f'{"training" if args.train else "inference"} step of {args.dtype}, batch {args.batch_size}'
    title = f'Per {what}, mean of {args.steps}; {summarise_environment(environment)}'
    text = format_text(results, args.top, args.device.type == 'cuda', title)
    write_report(args.results, text, {**environment, 'settings': settings, 'models': results})
    print(f'\n{text}')


if __name__ == '__main__':
    main()
