""" Time, memory and cost of models, measured together

All models run in one process, one batch each per round. The order alternates from round to round, so that other load on
the machine slows all of them. Ratios are medians of the ratios in each round.
"""
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import timm
import torch
from timm.layers import to_2tuple
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from timm_evo import count_gmacs

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
COMPILE_MODES = ('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs')
NUM_WARMUP = 3
LATENCY_ROUNDS = 5  # factor on the number of rounds for batches of one image, which take little time

if not torch.cuda.is_available():  # otherwise torch.profiler warns at each use, inside a progress bar
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')


def dense_twin(name: str) -> str:
    """The dense model that `name` is compared with. For a dense model, this is the model itself."""
    return name.removeprefix('evo_').replace('levit_cls_', 'levit_')


@dataclass
class Variant:
    """A model with arguments, one row of the results.

    Attributes:
        label: Unique name in the results.
        model: Model name.
        kwargs: Arguments of `timm.create_model`.
        dense: Label of the variant that it is compared with.
        build: Function that makes the model, if it is not timm's. Then `model` is a model of timm with the same input.
    """
    label: str
    model: str
    kwargs: dict
    dense: str
    build: Callable[[], nn.Module] | None = None


class Through(nn.Module):
    """A model that is run by another method than `forward`.

    Args:
        model: The model.
        run: Function of the model and images that runs it.
    """

    def __init__(self, model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, images: Tensor) -> Tensor:
        return self.run(self.model, images)


def with_twins(
        names: list[str],
        img_size: int | None = None,
        evolution_kwargs: dict | None = None,
        each: list[dict] | None = None,
) -> list[Variant]:
    """The models to run: each of `names` once, evolved ones directly after their dense twins.

    Args:
        names: Evolved and dense models.
        img_size: Image size of all models; None for their own.
        evolution_kwargs: Arguments of the evolved models.
        each: Further arguments. Each evolved model runs once with each of them, and its label has them.
    """
    shared = {} if img_size is None else {'img_size': img_size}
    evolutions = {
        ''.join(f', {key}={value}' for key, value in own.items()): (evolution_kwargs or {}) | own
        for own in each or [{}]
    }
    variants = []
    for name in dict.fromkeys(model for given in names for model in (dense_twin(given), given)):
        if name == dense_twin(name):
            variants.append(Variant(name, name, shared, name))
        else:
            variants += [
                Variant(name + suffix, name, shared | kwargs, dense_twin(name)) for suffix, kwargs in evolutions.items()
            ]
    return variants


def build_model(
        variant: Variant,
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        reparam: bool,
) -> tuple[nn.Module, Tensor]:
    """A model in evaluation mode and an image for it, as a batch of one."""
    try:
        model = variant.build() if variant.build else timm.create_model(variant.model, **variant.kwargs)
    except (TypeError, ValueError) as error:
        raise SystemExit(f'{variant.label}: {error}') from error
    if reparam:
        model = reparameterize_model(model.eval())
    model = model.eval().to(device=device, dtype=dtype, memory_format=memory_format)
    channels, height, width = timm.get_pretrained_cfg(variant.model).input_size
    if 'img_size' in variant.kwargs:
        height, width = to_2tuple(variant.kwargs['img_size'])
    return model, torch.randn(1, channels, height, width, device=device, dtype=dtype)


class Step:
    """The step that is timed: a batch through a model, in training with an update of the weights for random targets.

    Args:
        model: Model in evaluation mode, on the device of `batch`.
        batch: Images.
        train: Whether to train with AdamW.
        compile_mode: One of `COMPILE_MODES`; None to run it uncompiled.
        autocast: Dtype of mixed precision; None for no mixed precision.
    """

    def __init__(
            self,
            model: nn.Module,
            batch: Tensor,
            train: bool,
            compile_mode: str | None,
            autocast: torch.dtype | None,
    ) -> None:
        # evaluation mode is not set again, because this clears the biases of a LeViT that compiled code has cached
        self.model = model.train() if train else model
        self.batch = batch
        self.autocast = torch.autocast(batch.device.type, dtype=autocast, enabled=autocast is not None)
        # with None, PyTorch never chooses the fused optimizer
        fused = True if batch.device.type == 'cuda' else None
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=fused) if train else None
        self.compile_mode = compile_mode
        if compile_mode is None:
            self.forward = model
        else:
            # Static shapes, because models of several sizes share one `forward`, whose sizes would become dynamic.
            # A full graph, because after a graph break or too many compilations the rest would run uncompiled.
            self.forward = torch.compile(model, fullgraph=True, dynamic=False, mode=compile_mode)

    def __call__(self) -> None:
        if self.compile_mode is not None:
            # without this, CUDA graphs would treat the next model as a part of this step and keep the outputs
            torch.compiler.cudagraph_mark_step_begin()
        if self.optimizer is None:
            with torch.inference_mode(), self.autocast:
                self.forward(self.batch)
            return
        with self.autocast:
            logits = self.forward(self.batch)
            targets = torch.randint(logits.shape[1], (len(self.batch),), device=self.batch.device)
            loss = cross_entropy(logits, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # at the end, so that no gradients stay in memory until the model's next turn

    def num_bytes_held(self) -> int:
        """Bytes that stay in memory between steps: weights, buffers, optimizer state and the batch."""
        tensors = [*self.model.parameters(), *self.model.buffers(), self.batch]
        if self.optimizer is not None:
            tensors += [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return sum(tensor.nbytes for tensor in tensors)


def time_step(step: Step) -> float:
    """Seconds that one step takes, on the clock of the device it runs on."""
    if step.batch.device.type == 'cuda':
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()  # running kernels would hide the time that the CPU needs for launches
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure_memory(step: Step) -> int:
    """Bytes in use at the peak of a model's second step.

    This is the sum of two parts. One is what the model keeps between steps: weights, buffers, batch, and in training
    the optimizer's state, which the first step has made. The other is the most that PyTorch's allocator has given to
    this step at any time: activations, gradients, temporary tensors. On CUDA this is the peak that the allocator
    counts, on a CPU the running sum of allocations in the profiler. Not counted are other models, memory that an
    allocator keeps without using it, cached biases of LeViT, and memory of libraries (oneDNN, OpenMP, cuBLAS).

    The second step is measured, because CUDA graphs are recorded in it. Replayed graphs do not use the allocator.
    """
    if step.batch.device.type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return step.num_bytes_held() + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    return step.num_bytes_held() + max(accumulate((event.nbytes() for event in events), initial=0))


def prepare(
        variants: list[Variant],
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        autocast: torch.dtype | None = None,
        train: bool = False,
        compile_mode: str | None = None,
        channels_last: bool = False,
        reparam: bool = False,
) -> tuple[dict[str, Step], dict[str, dict]]:
    """A step of each variant and its cost, by label. Compiled code of earlier calls is discarded.

    Args:
        variants: Variants to run.
        device: Device to run on.
        dtype: Dtype of weights and images.
        autocast: Dtype of mixed precision; None for no mixed precision.
        batch_size: Number of images in a step.
        train: Whether a step trains.
        compile_mode: One of `COMPILE_MODES`; None to run it uncompiled.
        channels_last: Whether weights and images have the memory format channels_last.
        reparam: Whether layers that timm can fuse for inference are fused, such as the batch norms of LeViT.
    """
    if compile_mode is not None:
        torch.compiler.reset()
        # all models of a class share the compilations of its `forward`; the default is 8
        torch._dynamo.config.cache_size_limit = 8 * len(variants)
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()

    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    batches: dict[torch.Size, Tensor] = {}
    steps, costs = {}, {}
    for variant in variants:
        model, image = build_model(variant, device, dtype, memory_format, reparam)
        costs[variant.label] = {
            'gmacs': count_gmacs(model, image), 'params': sum(p.numel() for p in model.parameters())}
        if image.shape not in batches:
            batch = torch.randn(batch_size, *image.shape[1:], device=device, dtype=dtype)
            batches[image.shape] = batch.contiguous(memory_format=memory_format)
        steps[variant.label] = Step(model, batches[image.shape], train, compile_mode, autocast)
    return steps, costs


def measure(variants: list[Variant], *, rounds: int, **how) -> dict[str, dict]:
    """Cost, peak memory of a step, and seconds per batch in each round of each variant, by label.

    Args:
        variants: Variants to run.
        rounds: Number of timed batches of each.
        **how: Arguments of `prepare`.
    """
    steps, results = prepare(variants, **how)
    with tqdm(total=(NUM_WARMUP + rounds) * len(steps), unit='batch') as progress:
        for label, step in steps.items():
            progress.set_description(f'warm-up {label}')
            step()
            results[label]['peak_memory'] = measure_memory(step)
            for _ in range(NUM_WARMUP - 2):
                step()
            results[label]['seconds'] = []
            progress.update(NUM_WARMUP)
        progress.set_description('rounds')
        for i in range(rounds):
            for label in steps if i % 2 == 0 else reversed(steps):
                if how['device'].type == 'cuda':
                    steps[label]()  # so that caches and clock rates are those of this model alone
                results[label]['seconds'].append(time_step(steps[label]))
                progress.update()
    return results


def summarise(variants: list[Variant], results: dict[str, dict], batch_size: int) -> dict[str, dict]:
    """Medians, quartiles and ratios to the dense twin. A larger ratio means faster, cheaper or smaller.

    `flop_limit_share` is the ratio of throughputs divided by the ratio of multiply-accumulates.
    """
    summary = {}
    for variant in variants:
        result, dense = results[variant.label], results[variant.dense]
        seconds = torch.tensor(result['seconds'], dtype=torch.float64)
        dense_seconds = torch.tensor(dense['seconds'], dtype=torch.float64)
        lower, median, upper = seconds.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        ratio = (dense_seconds / seconds).quantile(0.5).item()
        flop_ratio = dense['gmacs'] / result['gmacs']
        summary[variant.label] = {
            'seconds_per_batch': {'lower_quartile': lower, 'median': median, 'upper_quartile': upper},
            'images_per_second': batch_size / median,
            'gmacs': result['gmacs'],
            'params': result['params'],
            'peak_memory_mb': result['peak_memory'] / 1e6,
            'ratio_to_dense': ratio,
            'flop_ratio_to_dense': flop_ratio,
            'flop_limit_share': ratio / flop_ratio,
            'memory_ratio_to_dense': dense['peak_memory'] / result['peak_memory'],
        }
    return summary
