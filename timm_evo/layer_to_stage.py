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
    """Tells models of each update by an optimizer; there is one for the process."""

    def __init__(self) -> None:
        self.models: weakref.WeakSet[LayerToStage] = weakref.WeakSet()
        self.num_counted = 0
        self.counted_before: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        register_optimizer_step_pre_hook(self._begin_step)
        register_optimizer_step_post_hook(self._end_step)

    def _begin_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self.counted_before[optimizer] = self.num_counted

    def _end_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if self.counted_before.get(optimizer) != self.num_counted:
            return  # it wraps another optimizer, whose step has been counted
        found_inf = getattr(optimizer, 'found_inf', None)
        if found_inf is not None and found_inf.item():
            return  # a gradient scaler leaves it to a fused optimizer to skip the step
        updated = {id(weight) for group in optimizer.param_groups for weight in group['params']}
        self.num_counted += any([model._count_update(updated) for model in self.models])


@functools.cache
def _update_counter() -> _UpdateCounter:
    return _UpdateCounter()  # where no model needs it, no optimizer is looked at


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
        """Set the schedule, and for how many updates a layer-wise one precedes it."""
        self.layerwise_updates = layerwise_updates
        self._stagewise = schedule
        self._layerwise = make_layerwise(schedule) if layerwise_updates else schedule
        if not layerwise_updates:
            self.register_buffer('num_updates', None)
        elif getattr(self, 'num_updates', None) is None:  # or else the schedule has been changed, and counting goes on
            device = next(self.parameters()).device
            self.register_buffer('num_updates', torch.zeros((), dtype=torch.long, device=device))
            self._counted: str | None = None  # the weight whose updates count
            _update_counter().models.add(self)
        self.schedule: Schedule | None = None
        self._set_count(0)
        self._read_count()

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
    def _count_update(self, updated: set[int]) -> bool:
        """Count an update.

        Args:
            updated: `id` of each weight that it was made to.

        Returns:
            Whether they are this model's, so that it counts.
        """
        weights = dict(self.named_parameters())
        if self._counted not in weights:
            # one of them, and the same from then on: an update by several optimizers, each for its weights, counts once
            self._counted = next((name for name in reversed(weights) if id(weights[name]) in updated), None)
        if self._counted is None or id(weights[self._counted]) not in updated:
            return False
        self.num_updates += 1
        self._set_count(self._count + 1)
        return True

    def _read_count(self) -> None:
        if self.num_updates is not None and self.num_updates.device.type != 'meta':
            self._set_count(int(self.num_updates))

    def _follow_count(self) -> None:
        """Take the schedule that goes with the buffer, if something has written to it, as averaging of weights does."""
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
            state_dict.setdefault(key, self.num_updates)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._read_count()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # a copy, or from a file
        if self.num_updates is not None:
            _update_counter().models.add(self)
