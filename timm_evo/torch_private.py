""" What torch has no public name for

A release of torch may rename each of these. So no other module of the library says them, and
`tests/test_torch_private.py` fails by the name that has gone. What is overridden stands in its class: `_apply`,
`_load_from_state_dict`, `_get_name` and `__jit_ignored_attributes__` of `nn.Module`, and `TorchDispatchMode` of
`torch.utils._python_dispatch`, which is a base class; they are tested there, too.
"""
import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]  # made in C++
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as _global

__all__ = [
    'WithoutTorchFunction', 'children', 'has_global_hooks', 'has_hooks', 'is_compiled', 'is_in_backward', 'is_plain',
    'is_transformed', 'num_writes', 'own_names', 'own_parameters', 'shallow_copy', 'share_buffers']

# within it, a tensor of a subclass is taken for the plain one that it is
WithoutTorchFunction = torch._C.DisableTorchFunctionSubclass

_Module = TypeVar('_Module', bound=nn.Module)


def has_hooks(module: nn.Module) -> bool:
    """Whether there are hooks on the module itself. torch adds and removes them, and lists them nowhere."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def has_global_hooks() -> bool:
    """Whether there are hooks on all modules, as by `register_module_forward_hook`; likewise."""
    return bool(
        _global._global_forward_hooks or _global._global_forward_pre_hooks
        or _global._global_backward_hooks or _global._global_backward_pre_hooks)


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of the module runs compiled code, after `module.compile()` or as `torch.compile(module)`.

    No public function tells.
    """
    return module._compiled_call_impl is not None or '_orig_mod' in module._modules


def children(module: nn.Module) -> list[nn.Module]:
    """The modules right within.

    `nn.Module.children` fails while another thread adds one, and is slower, which the forward pass would feel.
    """
    if not module._modules:
        return []
    return [child for child in list(module._modules.values()) if child is not None]


def own_parameters(module: nn.Module) -> list[nn.Parameter | None]:
    """The parameters of the module itself, also while another thread adds one."""
    return list(module._parameters.values())


def own_names(module: nn.Module) -> list[str]:
    """Names of what is registered in the module itself, also of what is None, which torch's iterators leave out."""
    return [*module._parameters, *module._buffers, *module._modules]


def share_buffers(module: nn.Module, other: nn.Module) -> bool:
    """Whether one is a shallow copy of the other: they have the same buffers then, also after one gets new ones."""
    return module._buffers is other._buffers


def shallow_copy(module: _Module) -> _Module:
    """A copy with the same parameters, buffers and modules, whose modules can be replaced.

    `copy.copy` leaves the dictionary of the modules to both.
    """
    module = copy.copy(module)
    module._modules = module._modules.copy()
    return module


def is_in_backward() -> bool:
    """Whether this thread runs a backward pass, in which a checkpoint calls modules once more."""
    return torch._C._current_graph_task_id() != -1


def is_plain(tensor: Tensor) -> bool:
    """Whether it is no tensor of a subclass, but for those without values that show what would be computed."""
    return type(tensor) in (Tensor, FakeTensor)


@torch.compiler.assume_constant_result  # what is compiled is compiled anew within other transforms
def is_transformed() -> bool:
    """Whether a transform of `torch.func` is at work, or gradients in forward mode."""
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def num_writes(tensor: Tensor) -> int:
    """How often torch has written to a tensor in place; not for a tensor of inference mode."""
    return tensor._version
