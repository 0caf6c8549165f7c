""" Private names of torch that the library needs

A release of torch may rename each of them. So no other module uses them, and `tests/test_torch_private.py` fails with
the missing name. There are two exceptions, which the test covers, too: names that classes override (`_apply`,
`_load_from_state_dict`, `_get_name` and `__jit_ignored_attributes__` of `nn.Module`), and the base class
`TorchDispatchMode` of `torch.utils._python_dispatch`.
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

# a context in which a tensor of a subclass is treated as a plain tensor
WithoutTorchFunction = torch._C.DisableTorchFunctionSubclass

_Module = TypeVar('_Module', bound=nn.Module)


def has_hooks(module: nn.Module) -> bool:
    """Whether there are hooks on the module itself, which no public function of torch lists."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def has_global_hooks() -> bool:
    """Whether there are hooks on all modules, as from `register_module_forward_hook`."""
    return bool(
        _global._global_forward_hooks or _global._global_forward_pre_hooks
        or _global._global_backward_hooks or _global._global_backward_pre_hooks)


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of the module runs compiled code, after `module.compile()` or as `torch.compile(module)`."""
    return module._compiled_call_impl is not None or '_orig_mod' in module._modules


def children(module: nn.Module) -> list[nn.Module]:
    """The direct submodules.

    `nn.Module.children` fails while another thread adds one, and is too slow for the forward pass.
    """
    if not module._modules:
        return []
    return [child for child in list(module._modules.values()) if child is not None]


def own_parameters(module: nn.Module) -> list[nn.Parameter | None]:
    """The parameters of the module itself. It works while another thread adds one."""
    return list(module._parameters.values())


def own_names(module: nn.Module) -> list[str]:
    """Names of the module's own parameters, buffers and submodules, also of those that are None."""
    return [*module._parameters, *module._buffers, *module._modules]


def share_buffers(module: nn.Module, other: nn.Module) -> bool:
    """Whether one module is a shallow copy of the other. They then share buffers that are registered later, too."""
    return module._buffers is other._buffers


def shallow_copy(module: _Module) -> _Module:
    """A copy with the same parameters, buffers and modules, whose modules can be replaced.

    After `copy.copy` alone, both share the dictionary of the modules.
    """
    module = copy.copy(module)
    module._modules = module._modules.copy()
    return module


def is_in_backward() -> bool:
    """Whether this thread runs a backward pass, in which checkpointing calls modules again."""
    return torch._C._current_graph_task_id() != -1


def is_plain(tensor: Tensor) -> bool:
    """Whether the class of a tensor is `Tensor`, or `FakeTensor`, which has no values."""
    return type(tensor) in (Tensor, FakeTensor)


@torch.compiler.assume_constant_result  # torch compiles again inside other transforms
def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active."""
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def num_writes(tensor: Tensor) -> int:
    """Number of in-place writes to a tensor. torch does not count them for a tensor of inference mode."""
    return tensor._version
