""" The operators that take most of the time of a model and of its dense twin

    python benchmarks/profile_model.py --models evo_deit_small_patch16_224 --results before

This profiles a few steps with torch.profiler. It writes the operators, or on CUDA the kernels, that take most of the
time, and the numbers of operators that PyTorch has called and of kernels that the CPU has launched. All are per step.
Times include the cost of the profiler, so use those of `throughput.py` for ratios.
"""
import argparse
import re
from collections import defaultdict
from itertools import chain
from operator import itemgetter

import torch
from common.arguments import add_how, add_models, choose_how, describe_how, parse_and_check, positive_int
from common.environment import describe_environment, summarise_environment
from common.measuring import NUM_WARMUP, Step, prepare, with_twins
from common.report import write_report
from common.results import add_results, markdown_table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

DEFAULT_MODELS = ['evo_deit_small_patch16_224']
# a CUDA graph is one launch for all its kernels
LAUNCH = re.compile(r'cu(da)?(Launch(Cooperative)?Kernel|GraphLaunch)')
MAX_NAME = 90  # names of kernels can be thousands of letters long


def profile_step(step: Step) -> list[tuple[str, float, int, bool]]:
    """Name, microseconds and calls of each operator and CUDA kernel of a step, and whether its time counts.

    On CUDA the kernels are timed, and the operators that launch them are only counted.
    """
    on_cuda = step.batch.device.type == 'cuda'
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        step()
        if on_cuda:
            torch.cuda.synchronize()
    events = []
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:
            events.append((event.key, event.self_cpu_time_total, event.count, not on_cuda))
        elif not event.is_user_annotation:  # kernels of named ranges are counted themselves
            events.append((event.key, event.self_device_time_total, event.count, True))
    return events


def summarise_steps(steps: list[list[tuple[str, float, int, bool]]]) -> dict:
    """Time by operator on a CPU, by kernel on CUDA, and numbers of calls, all per step."""
    times, calls = defaultdict(float), defaultdict(float)
    operator_calls = kernel_launches = 0
    for name, microseconds, count, timed in chain.from_iterable(steps):
        operator_calls += count if name.startswith('aten::') else 0
        kernel_launches += count if LAUNCH.match(name) else 0
        if timed:
            times[name] += microseconds / 1000 / len(steps)
            calls[name] += count / len(steps)
    total = sum(times.values())
    if not total:
        raise SystemExit('torch.profiler has recorded nothing. Is another profiler running?')
    return {
        'ms': total,
        'operator_calls': operator_calls / len(steps),
        'kernel_launches': kernel_launches / len(steps),
        'operators': [
            {'name': name, 'self_ms': ms, 'share': ms / total, 'calls': calls[name]}
            for name, ms in sorted(times.items(), key=itemgetter(1), reverse=True) if ms > 0
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
    parser = argparse.ArgumentParser(description='Operators that take the time of evolved models and their twins.')
    add_models(parser, DEFAULT_MODELS)
    add_how(parser)
    parser.add_argument('--batch-size', type=positive_int, default=16, metavar='N', help='batch size (default: 16)')
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
    profiled = defaultdict(list)
    with tqdm(total=(NUM_WARMUP + args.steps) * len(steps), unit='step') as progress:
        for i in range(NUM_WARMUP + args.steps):  # in turn, so that other load on the machine slows all models
            for label, step in steps.items():
                progress.set_description(label)
                if i < NUM_WARMUP:
                    step()
                else:
                    profiled[label].append(profile_step(step))
                progress.update()
    for label in steps:
        results[label] |= summarise_steps(profiled[label])

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
