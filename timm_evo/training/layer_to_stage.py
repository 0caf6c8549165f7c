""" Layer-to-stage training

`Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390, section
"Training strategies": one selection per block at first, and one per stage in the rest of the training and at inference.

Training scripts need no changes. A model counts the updates of its weights itself, by a hook that PyTorch calls after
each step of any optimizer. So gradient accumulation is not counted, and neither are steps that a gradient scaler skips.
Compiled graphs have no counter. For them, the schedule changes once.
"""
import functools
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..method.schedule import Schedule, make_layerwise
from ..torch_private import children, num_writes, own_parameters, share_buffers

if TYPE_CHECKING:
    from typing_extensions import Self

    class _Module(nn.Module):
        """The evolved class, which follows `LayerToStage` in the bases of a model."""
        evolution_config: Any
        schedule: Schedule  # the current one
        num_updates: Any  # Tensor | None, a buffer

        def _apply_schedule(self, schedule: Schedule) -> None: ...
        def _take_evolution_away(self, names: frozenset[str]) -> None: ...
else:
    _Module = object

__all__ = ['LayerToStage']


class _Count:
    """The number of updates of a model. Shallow copies of the model share it, as they share its weights and buffers.

    Attributes:
        value: The number. Reading the buffer instead would wait for its device.
        buffer_state: `_state_of` the buffer when it had this value.
        changed: Weights (`id`) that the last update has changed so far.
        lock: Held while any of these changes.
    """

    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.buffer_state: tuple[int, int] | None = None
        self.changed: set[int] = set()
        self.lock = threading.RLock()  # a signal handler may evaluate the model while its thread has the lock

    def __reduce__(self) -> tuple:
        return _Count, (self.value,)  # a deep copy, or a copy from a file, has its own weights


class _StepTimes(threading.local):
    """Times of the last steps in a thread, which tell whether one step was made within another.

    A step that fails needs no cleanup, because the next step of its optimizer has a later time.

    Attributes:
        clock: A number that increases with every step.
        began: When each optimizer began its last step.
        counted: When each count was last increased.
    """

    def __init__(self) -> None:
        self.clock = itertools.count(1)
        self.began: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self.counted: weakref.WeakKeyDictionary[_Count, int] = weakref.WeakKeyDictionary()


_counts: weakref.WeakKeyDictionary['LayerToStage', _Count] = weakref.WeakKeyDictionary()  # of all models that count
_times = _StepTimes()
_hooks_lock = threading.Lock()


def _counting_models() -> list[tuple['LayerToStage', _Count]]:
    """The models that count, as a snapshot, because other threads may create and delete models at any time."""
    models = [model for reference in _counts.keyrefs() if (model := reference()) is not None]
    return [(model, count) for model in models if (count := _counts.get(model)) is not None]


@functools.cache
def _watch_optimizers() -> None:
    """Register hooks on all optimizers, once, when the first model starts to count."""
    # the annotations of `torch.compiler.disable` do not keep the signature
    register_optimizer_step_pre_hook(_begin_step)  # pyright: ignore[reportArgumentType]
    register_optimizer_step_post_hook(_end_step)  # pyright: ignore[reportArgumentType]


@torch.compiler.disable  # a compiled step would be compiled again for each value of the count
def _begin_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    _times.began[optimizer] = next(_times.clock)


@torch.compiler.disable
def _end_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    began = _times.began.get(optimizer, 0)  # unknown if the hooks were registered during this step
    stepped = {id(weight) for group in optimizer.param_groups for weight in group['params']}
    for count, model in {count: model for model, count in _counting_models()}.items():  # one model for each count
        own = stepped & _weights(model)
        # an optimizer may wrap others: a step that was counted inside this one is the same update
        is_counted = _times.counted.get(count, 0) > began
        if own and not is_counted and not _is_skipped(optimizer):
            _times.counted[count] = next(_times.clock)
            model._count_step(own)


def _weights(module: nn.Module) -> set[int]:
    """`id` of each parameter. Unlike `module.parameters()`, it works while another thread adds parameters."""
    return set(map(id, own_parameters(module))).union(*map(_weights, children(module)))


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer has skipped a step because a scaler has found infinite gradients."""
    found_inf = getattr(optimizer, 'found_inf', None)
    return found_inf is not None and bool(found_inf.item())


def _state_of(tensor: Tensor) -> tuple[int, int] | None:
    """A value that changes when the tensor is written to or replaced; None for a tensor of inference mode."""
    return None if tensor.is_inference() else (id(tensor), num_writes(tensor))


def _is_exporting() -> bool:
    # an older torch only tells whether any thread is compiling
    return getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)()


def _count_tensor(value: int, device: torch.device | None = None) -> Tensor:
    with torch.inference_mode(False):  # training could not write to a tensor of inference mode
        return torch.tensor(value, device=device)


class LayerToStage(_Module):
    """Layer-wise selection in the first optimizer updates, and stage-wise selection after these.

    `layerwise_class` puts it before an evolved class in the bases. The count is a buffer, `num_updates`, so that
    checkpoints, averaged copies and all ranks have it. Models without layer-wise updates do not have the buffer. State
    dicts with and without it both load strictly.

    Attributes:
        num_updates: The count; None if no updates are layer-wise.
    """
    def _start_schedule(self, schedule: Schedule) -> None:
        """Use a stage-wise schedule, but a layer-wise one for the first updates. An existing count continues."""
        updates = self.evolution_config.layerwise_updates
        self._stagewise = schedule
        self._layerwise = make_layerwise(schedule) if updates else schedule
        if not updates:
            self._stop_counting()
            self.register_buffer('num_updates', None)
        elif getattr(self, 'num_updates', None) is None:
            self.register_buffer('num_updates', _count_tensor(0, next(self.parameters()).device))
        if self not in _counts:
            self._count = _Count()
        if updates:
            self._start_counting()
        self.schedule = None  # pyright: ignore[reportAttributeAccessIssue]  # until the next line
        self._choose_schedule()
        self._read_count()

    def _start_counting(self) -> None:
        with _hooks_lock:  # a cached function may run in two threads at once
            _watch_optimizers()
        shared = (count for model, count in _counting_models() if share_buffers(model, self))
        self._count = _counts[self] = next(shared, self._count)

    def _stop_counting(self) -> None:
        """Stop counting, also in shallow copies, because they share the buffers."""
        for model in self._sharing_models():
            _counts.pop(model, None)

    def _sharing_models(self) -> set['LayerToStage']:
        """This model and its shallow copies that count. They share the buffers, also after `.to`."""
        return {self, *(model for model, _ in _counting_models() if share_buffers(model, self))}

    def _choose_schedule(self) -> None:
        """Apply the schedule for the current count, if it is not applied yet."""
        is_layerwise = self.num_updates is not None and self._count.value < self.evolution_config.layerwise_updates
        schedule = self._layerwise if is_layerwise else self._stagewise
        if schedule is not self.schedule:
            self._apply_schedule(schedule)

    def _set_count(self, value: int) -> None:
        """Store the value of the buffer, and choose the schedule of all models that share it."""
        self._count.value = value
        self._count.buffer_state = _state_of(self.num_updates)
        for model in self._sharing_models():
            model._choose_schedule()

    @torch.no_grad()
    def _count_step(self, weights: set[int]) -> None:
        """Count a step that has changed some weights, unless it is a part of the last update.

        Several optimizers with different weights make one update together. If a weight changes again, this is the next
        update.
        """
        count = self._count
        with count.lock:
            if not count.changed or weights & count.changed:
                count.changed = set()
                self.num_updates += 1
                self._set_count(count.value + 1)
            count.changed |= weights

    def _read_count(self) -> None:
        if self.num_updates is not None and not self.num_updates.is_meta:
            with self._count.lock:
                self._set_count(int(self.num_updates))

    def _follow_count(self) -> None:
        """Read the count again, if something else has written to the buffer, as weight averaging does.

        This is for inference without compilation. A compiled model reads the buffer in `train` and `eval`.
        """
        if self.num_updates is None or torch.compiler.is_dynamo_compiling() or _is_exporting():
            return
        if self.training:  # in training, only broadcasts between ranks write to the buffer, with the same value
            return
        if self._count.buffer_state is None or self._count.buffer_state != _state_of(self.num_updates):
            self._read_count()

    def train(self, mode: bool = True) -> 'Self':
        """Set training or evaluation mode, as `nn.Module.train`. A compiled model reads a changed count here."""
        super().train(mode)
        self._read_count()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        if self.num_updates is not None:  # the value is not read from the buffer, which may have none yet
            state_dict.setdefault(f'{prefix}num_updates', _count_tensor(self._count.value))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._read_count()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # of a copy, or of a model from a file
        if self.num_updates is not None:
            self._start_counting()

    def _take_evolution_away(self, names: frozenset[str]) -> None:
        self._stop_counting()
        super()._take_evolution_away(names | {'num_updates', '_stagewise', '_layerwise', '_count'})


@functools.cache
def layerwise_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A class of the same name that adds layer-to-stage training to an evolved class."""
    def reduce(self, protocol):  # copying and pickling cannot find the class by its name
        function, args, *rest = cls.__reduce_ex__(self, protocol)
        return (_new, (function, tuple(cls if arg is type(self) else arg for arg in args)), *rest)

    return type(cls.__name__, (LayerToStage, cls), {
        **{name: getattr(cls, name) for name in ('__doc__', '__module__', '__qualname__')},
        '__reduce_ex__': reduce,
    })


def _new(function: Callable[..., nn.Module], args: tuple) -> nn.Module:
    model = function(*args)
    model.__class__ = layerwise_class(type(model))  # pyright: ignore[reportAttributeAccessIssue]
    return model
