"""Names that torch may change without notice: all are in one module, and each that has gone fails here, by its name."""
import ast
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

import timm_evo
from timm_evo import torch_private

PACKAGE = Path(timm_evo.__file__).parent

# what a class of the library overrides, or inherits from, where it stands
OVERRIDDEN = {'_apply', '_load_from_state_dict', '_get_name'}
BASES = {'torch.utils._python_dispatch'}


def private_names() -> set[str]:
    """Attributes of torch's objects with a leading underscore, but not those that Python itself knows."""
    objects = nn.Linear(1, 1), torch.empty(0), torch.optim.SGD([torch.empty(0)])
    return {name for some in objects for name in dir(some) if name.startswith('_') and not name.endswith('__')}


def used_names(file: Path) -> set[str]:
    """Private names of torch that a file says, as attributes and in imports."""
    used, private = set(), private_names()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and (
                node.attr in private or node.attr.startswith('_') and ast.unparse(node).startswith('torch.')):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition('.')[0] == 'torch':
            names = [f'{node.module}.{alias.name}' for alias in node.names]
            used.update(name for name in names if '._' in name and node.module not in BASES)
    return used


def test_no_other_module_says_a_private_name_of_torch():
    files = [file for file in PACKAGE.rglob('*.py') if file.name != 'torch_private.py']
    assert used_names(PACKAGE / 'torch_private.py')
    assert {file.name: used for file in files if (used := used_names(file) - OVERRIDDEN)} == {}


# What the module asks for


@pytest.mark.parametrize('register', [
    'register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook', 'register_backward_hook',
    'register_full_backward_pre_hook',
])
def test_hooks_on_a_module_are_seen(register):
    module = nn.Sequential(nn.Identity())
    assert not torch_private.has_hooks(module)
    handle = getattr(module[0], register)(lambda *_: None)
    assert torch_private.has_hooks(module[0]) and not torch_private.has_hooks(module)
    handle.remove()
    assert not torch_private.has_hooks(module[0])


@pytest.mark.parametrize('register', [
    'register_module_forward_hook', 'register_module_forward_pre_hook', 'register_module_full_backward_hook',
    'register_module_full_backward_pre_hook',
])
def test_hooks_on_all_modules_are_seen(register):
    assert not torch_private.has_global_hooks()
    handle = getattr(global_hooks, register)(lambda *_: None)
    try:
        assert torch_private.has_global_hooks()
    finally:
        handle.remove()
    assert not torch_private.has_global_hooks()


def test_modules_that_are_compiled_are_known():
    module = nn.Linear(2, 2)
    assert not torch_private.is_compiled(module)
    assert torch_private.is_compiled(torch.compile(module)) and not torch_private.is_compiled(module)
    module.compile()
    assert torch_private.is_compiled(module)


def test_a_backward_pass_is_known():
    x, seen = torch.ones(1, requires_grad=True), []
    y = x * 2
    y.register_hook(lambda gradient: seen.append(torch_private.is_in_backward()))
    seen.append(torch_private.is_in_backward())
    y.sum().backward()
    seen.append(torch_private.is_in_backward())
    assert seen == [False, True, False]


def test_what_is_registered_in_a_module_is_named_also_where_it_is_none():
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    module.register_buffer('count', None)
    module.register_module('absent', None)
    assert torch_private.children(module) == [module[0], module[1]]
    assert torch_private.children(module[0]) == []
    parameters = torch_private.own_parameters(module[0])
    assert len(parameters) == 2 and parameters[0] is module[0].weight and parameters[1] is None
    assert torch_private.own_names(module[0]) == ['weight', 'bias']
    assert torch_private.own_names(module) == ['count', '0', '1', 'absent']


def test_modules_and_parameters_are_listed_while_a_thread_adds_some():
    module, done = nn.Module(), threading.Event()

    def add() -> None:
        for i in range(3000):
            module.register_parameter(f'weight{i}', nn.Parameter(torch.empty(0)))
            module.add_module(f'part{i}', nn.Identity())
        done.set()

    thread = threading.Thread(target=add)
    thread.start()
    while not done.is_set():
        torch_private.own_parameters(module)
        torch_private.children(module)
    thread.join()
    assert len(torch_private.own_parameters(module)) == len(torch_private.children(module)) == 3000


def test_a_shallow_copy_has_the_buffers_of_the_original_and_modules_of_its_own():
    module, other = nn.Sequential(nn.BatchNorm1d(2)), nn.Sequential(nn.BatchNorm1d(2))
    copied = torch_private.shallow_copy(module)
    assert torch_private.share_buffers(copied, module) and not torch_private.share_buffers(copied, other)
    module.double()
    assert torch_private.share_buffers(copied, module)
    copied[0] = nn.Identity()
    assert isinstance(module[0], nn.BatchNorm1d) and isinstance(copied[0], nn.Identity)


def test_writes_to_a_tensor_are_counted():
    tensor = torch.zeros(2)
    before = torch_private.num_writes(tensor)
    tensor.add_(1)
    assert torch_private.num_writes(tensor) == before + 1


# What is overridden: torch calls it


def test_moving_a_module_calls_apply_of_every_module():
    class Moved(nn.Module):
        def _apply(self, fn, *args, **kwargs):
            calls.append(self)
            return super()._apply(fn, *args, **kwargs)

    calls = []
    nn.Sequential(Moved()).double()
    assert len(calls) == 1


def test_loading_calls_load_from_state_dict_of_every_module_with_the_state_dict_and_a_prefix():
    class Loaded(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
            calls.append(prefix)
            state_dict.setdefault(f'{prefix}bias', torch.zeros(2))
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    calls = []
    nn.Sequential(Loaded(2, 2)).load_state_dict({'0.weight': torch.zeros(2, 2)})
    assert calls == ['0.']


def test_a_module_is_shown_by_get_name():
    class Shown(nn.Module):
        def _get_name(self) -> str:
            return 'AnotherName'

    assert repr(Shown()) == 'AnotherName()'


@pytest.mark.filterwarnings('ignore:.*torch.jit.script.*')
def test_torchscript_leaves_out_what_jit_ignored_attributes_names():
    class Scripted(nn.Module):
        __jit_ignored_attributes__ = ['left_out']

        def __init__(self) -> None:
            super().__init__()
            self.left_out, self.taken = 1, 2

        def forward(self, x: Tensor) -> Tensor:
            return x

    code = torch.jit.script(Scripted())._c
    assert code.hasattr('taken') and not code.hasattr('left_out')


def test_a_dispatch_mode_sees_every_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    with Counting() as mode:
        torch.zeros(2) + 1
    assert mode.calls == 2
