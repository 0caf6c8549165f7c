""" Layer-to-stage training

`Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390, section
"Training strategies": one selection per block at first, one per stage for the rest of the training and for inference.

A training script knows nothing of this, so a model counts the updates of its weights itself. PyTorch calls back after
each step of any optimizer, which makes the count blind to gradient accumulation and to steps that a gradient scaler
skips, and keeps it out of compiled graphs: what they see is a schedule that changes once.
"""
import functools
import weakref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .schedule import Schedule, cut_schedule, make_layerwise

__all__ = ['LayerToStage']


class _UpdateCounter:
    """Tells models of each update of their weights; there is one for the process.

    Attributes:
        models: Those that count, and the weights (`id`) that the last update of each has changed so far.
        num_counted: Updates of any of them.
        counted_before: `num_counted` when an optimizer began its step.
    """

    def __init__(self) -> None:
        self.models: weakref.WeakKeyDictionary[LayerToStage, set[int]] = weakref.WeakKeyDictionary()
        self.num_counted = 0
        self.counted_before: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        register_optimizer_step_pre_hook(self._begin_step)
        register_optimizer_step_post_hook(self._end_step)

    def add(self, model: 'LayerToStage') -> None:
        self.models[model] = set()

    def remove(self, model: 'LayerToStage') -> None:
        self.models.pop(model, None)

    def _begin_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self.counted_before[optimizer] = self.num_counted

    def _end_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if self.counted_before.get(optimizer) != self.num_counted:
            return  # it wraps another optimizer, whose step has been counted
        weights = {id(weight) for group in optimizer.param_groups for weight in group['params']}
        for model, updated in self.models.items():
            own = weights.intersection(map(id, model.parameters()))
            if not own or _is_skipped(optimizer):
                continue
            # several optimizers, each for its weights, make one update together; weights change again in the next one
            if not updated or own & updated:
                updated.clear()
                model._count_update()
                self.num_counted += 1
            updated |= own


@functools.cache
def _update_counter() -> _UpdateCounter:
    return _UpdateCounter()  # where no model needs it, no optimizer is looked at


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a step changes nothing because of infinite gradients; a scaler leaves that to a fused optimizer."""
    found_inf = getattr(optimizer, 'found_inf', None)
    return found_inf is not None and bool(found_inf.item())


def _version(tensor: Tensor) -> int | None:
    """A number that changes whenever the tensor is written to; a tensor of inference mode has none."""
    return None if tensor.is_inference() else tensor._version


class LayerToStage:
    """Layer-wise selection until a number of optimizer updates have been made, stage-wise from then on.

    To stand before a timm class in the bases of a model. The count is a buffer, `num_updates`, so that checkpoints,
    averaged copies and ranks have it. It is there only with such a schedule; a state dict with and one without it both
    load strictly.
    """

    def _init_schedule(self, schedule: Schedule, layerwise_updates: int) -> None:
        """Set the schedule, and for how many updates a layer-wise one precedes it; a count that is there goes on."""
        self.layerwise_updates = layerwise_updates
        self._stagewise = schedule
        self._layerwise = make_layerwise(schedule) if layerwise_updates else schedule
        if not layerwise_updates:
            self._stop_counting()
            self.register_buffer('num_updates', None)
        elif getattr(self, 'num_updates', None) is None:
            device = next(self.parameters()).device
            self.register_buffer('num_updates', torch.zeros((), dtype=torch.long, device=device))
            _update_counter().add(self)
        self.schedule: Schedule | None = None  # the one in force
        self._set_count(0)
        self._read_count()

    def _stop_counting(self) -> None:
        if getattr(self, 'num_updates', None) is not None:
            _update_counter().remove(self)

    def _set_schedule(self, schedule: Schedule) -> None:
        """Take a schedule, for a model that hands its parts on to extend."""
        self.schedule = schedule

    def _cut_schedule(self, length: int) -> None:
        """Leave the first entries of the schedule."""
        self._stagewise = cut_schedule(self._stagewise, length)
        self._layerwise = cut_schedule(self._layerwise, length)
        self._set_count(self._count)

    def _set_count(self, count: int) -> None:
        """Note the count as the buffer has it, and take the schedule that goes with it."""
        self._count = count  # the buffer may be on a device that is slow to ask
        self._seen = None if self.num_updates is None else _version(self.num_updates)
        schedule = self._layerwise if count < self.layerwise_updates else self._stagewise
        if schedule is not self.schedule:
            self._set_schedule(schedule)

    @torch.no_grad()
    def _count_update(self) -> None:
        self.num_updates += 1
        self._set_count(self._count + 1)

    def _read_count(self) -> None:
        if self.num_updates is not None and self.num_updates.device.type != 'meta':
            self._set_count(int(self.num_updates))

    def _follow_count(self) -> None:
        """Take the schedule that goes with the buffer, if something has written to it, as averaging of weights does.

        For inference that is not compiled; what is compiled looks at the buffer when its mode is set.
        """
        if self.num_updates is None or torch.compiler.is_compiling():
            return
        if self.training:  # what writes to it besides the count itself is a broadcast between ranks, of the same
            return
        if self._seen is None or self._seen != _version(self.num_updates):
            self._read_count()

    def train(self, mode: bool = True) -> nn.Module:
        """Set training or evaluation mode, as `nn.Module.train`; a compiled model follows a written count here."""
        super().train(mode)
        self._read_count()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        key = f'{prefix}num_updates'
        if self.num_updates is None:
            state_dict.pop(key, None)
        else:
            state_dict.setdefault(key, torch.tensor(self._count))  # not the buffer, which may have no value yet
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._read_count()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # a copy, or from a file
        if self.num_updates is not None:
            _update_counter().add(self)
