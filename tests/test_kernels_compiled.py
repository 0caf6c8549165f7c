"""Kernels as compilers see them, without a GPU and without Triton's interpreter."""
import pytest
import torch
from this_torch import run_without_interpreter
from torch.torch_version import TorchVersion

pytest.importorskip('triton')
pytestmark = pytest.mark.skipif(
    torch.__version__ < TorchVersion('2.8') or torch.version.hip is not None,
    reason='tried from torch 2.8 on, and for CUDA')


def test_they_compile_for_a_gpu_without_one():
    """By Triton's compiler, which refuses much that the interpreter takes."""
    lines = run_without_interpreter('compile_kernels.py', '80')
    assert len(lines) > 30
    assert max(int(shared) for *_, shared in lines) <= 99 * 1024, lines  # what there is on a small GPU


@pytest.mark.skipif(torch.__version__ < TorchVersion('2.11'), reason='tried from torch 2.11 on')
def test_the_compiler_takes_them_into_one_graph():
    numbers = {(name, selection): int(number) for name, selection, number in run_without_interpreter('one_graph.py')}
    # an event of three is four kernels, and attention one in each block behind the first event but the last
    assert numbers.pop(('deit_tiny_patch16_224', 'similarity')) == 3 * 4 + 3
    assert len(numbers) == 5 and min(numbers.values()) >= 4, numbers
