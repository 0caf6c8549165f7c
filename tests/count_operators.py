"""Count the kernels that a forward pass launches on a GPU, on a machine without one, in a separate process.

    python tests/count_operators.py MODEL [MODEL ...] [--all]

Views and new memory launch nothing, so they are left out. Attention is one operator, as on a GPU. This prints the
model, the selection or 'dense', and the number; with --all, also the calls of each operator.
"""
import os
import sys
from collections import Counter

os.environ.pop('TRITON_INTERPRET', None)  # kernels are only asked for the shapes of their results

import timm  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.func import functional_call  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import timm_evo  # noqa: E402

VIEWS = {
    'view', 'reshape', '_unsafe_view', 'transpose', 't', 'permute', 'unbind', 'slice', 'select', 'expand', 'unsqueeze',
    'squeeze', 'split', 'split_with_sizes', 'chunk', 'alias', 'detach', 'as_strided', 'flatten', 'unflatten', 'narrow',
    'device', 'empty', 'empty_like', 'new_empty', 'lift_fresh', '_reshape_alias'}


SEVERAL = {'average_alike': 4}  # launches of one operator


class Counts(TorchDispatchMode):
    """Counts operators that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.counts[name] += SEVERAL.get(name, 1)
        return func(*args, **(kwargs or {}))


def on_cuda(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, without values."""
    return torch.empty(
        tensor.shape, device='cuda', dtype=torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)


@torch.no_grad()
def count(name: str, selection: str) -> Counter[str]:
    model = timm.create_model(name).eval()
    if selection != 'dense':
        timm_evo.evolve(model, selection=selection)
    with FakeTensorMode(), Counts() as counter:
        # which is taken apart where there is no GPU
        def attend(query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
            counter.counts['attention'] += 1
            return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)

        F.scaled_dot_product_attention = attend
        state = {key: on_cuda(tensor) for key, tensor in [*model.named_parameters(), *model.named_buffers()]}
        images = torch.empty(8, *model.default_cfg['input_size'], device='cuda', dtype=torch.bfloat16)
        functional_call(model, state, images)
        counter.counts.clear()  # now the biases are there that timm's dense LeViT keeps
        functional_call(model, state, images)
    return counter.counts


if __name__ == '__main__':
    names = [name for name in sys.argv[1:] if name != '--all']
    for name in names:
        selections = ('dense', 'stage', 'layer') if 'levit' in name else ('dense', 'stage', 'layer', 'similarity')
        for selection in selections:
            counts = count(name, selection)
            print(name, selection, counts.total(), flush=True)
            if '--all' in sys.argv:
                print('   ', dict(counts.most_common()))
