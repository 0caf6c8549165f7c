"""Let torch.compile make one graph of models with kernels, on a machine without a GPU, in a separate process.

Nothing is computed: the compiler is stopped when it has the graph, in which each kernel must be a node. This prints the
model, the selection, and the number of kernels in the graph.
"""
import os

os.environ.pop('TRITON_INTERPRET', None)
os.environ['TIMM_EVO_KERNELS'] = '1'

import timm  # noqa: E402
import torch  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._dynamo.exc import BackendCompilerFailed  # noqa: E402
from torch.utils import _triton  # noqa: E402

import timm_evo  # noqa: E402
from timm_evo.kernels import attention, choice, levit, published, similarity  # noqa: E402, F401

_triton.has_triton = _triton.has_triton_package = lambda *args: True
choice._can_launch = lambda device: True


class Stop(Exception):
    pass


def stop(graph, inputs):
    stop.num_kernels = sum('triton_kernel_wrapper' in str(node.target) for node in graph.graph.nodes)
    raise Stop


def trace(name: str, selection: str, **kwargs) -> None:
    torch._dynamo.reset()
    model = timm_evo.evolve(timm.create_model(name, **kwargs), selection=selection).eval().to(torch.bfloat16)
    images = torch.zeros(2, *timm.get_pretrained_cfg(name).input_size, dtype=torch.bfloat16)
    compiled = torch.compile(
        model, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=stop, inference_compiler=stop))
    try:
        with torch.inference_mode():
            compiled(images)
    except Stop:
        pass
    except BackendCompilerFailed as error:
        if 'Stop' not in str(error):
            raise
    print(name, selection, stop.num_kernels, flush=True)


if __name__ == '__main__':
    for selection in ('similarity', 'stage', 'layer'):
        trace('deit_tiny_patch16_224', selection, depth=5)
    for selection in ('similarity', 'stage'):
        trace('vit_small_patch16_dinov3', selection, depth=5)
    trace('levit_128s', 'stage')
