"""Compile each kernel for a GPU, on a machine without one, in a separate process without Triton's interpreter.

    python tests/compile_kernels.py [COMPUTE CAPABILITY, such as 90]

This prints a line for each kernel: its name, the case, and the bytes of shared memory that it takes.
"""
import os
import sys

os.environ.pop('TRITON_INTERPRET', None)

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from timm_evo.kernels import attention, levit, published, similarity  # noqa: E402

TYPES = {
    torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16', torch.int32: '*i32', torch.int64: '*i64'}
launched = []


class Launcher:
    """Records the arguments with which a kernel is launched."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        assert all(isinstance(size, int) and size > 0 for size in grid)
        return lambda *args, **kwargs: launched.append((self.kernel, args, kwargs))


def type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return {int: 'i32', float: 'fp32', bool: 'i1'}[type(value)]


def compile_kernel(kernel, args: tuple, kwargs: dict, capability: int):
    options = {name: kwargs.pop(name) for name in ('num_warps', 'num_stages') if name in kwargs}
    given = dict(zip(kernel.arg_names, args)) | kwargs  # noqa: B905  # the last are given by their names
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or type(value) is int and value == 1:  # as a launch specialises it
            signature[parameter.name], constants[(parameter.num,)] = 'constexpr', value
        else:
            signature[parameter.name] = type_of(value)
            if isinstance(value, torch.Tensor) or type(value) is int and value % 16 == 0:
                attributes[(parameter.num,)] = [['tt.divisibility', 16]]
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=GPUTarget('cuda', capability, 32), options=options)


def compile_launched(of: str, capability: int) -> None:
    for kernel, args, kwargs in launched:
        compiled = compile_kernel(kernel, args, dict(kwargs), capability)
        print(kernel.fn.__name__, of, compiled.metadata.shared, flush=True)
    launched.clear()


def main(capability: int) -> None:
    for module in (attention, levit, published, similarity):
        module.wrap_triton = Launcher

    def tensor(*shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype)

    for batch_size, num_patches, num_channels, num_heads, dtype in (
            (1, 196, 384, 6, torch.bfloat16), (8, 196, 1024, 8, torch.float32), (2, 1369, 384, 6, torch.float16),
            (2, 1024, 1280, 16, torch.bfloat16)):
        num_tokens, head_dim = num_patches + 1, num_channels // num_heads
        x = tensor(batch_size, num_tokens, num_channels, dtype=dtype)
        query = tensor(batch_size, num_heads, num_tokens, head_dim, dtype=dtype)
        sizes = tensor(batch_size, num_tokens, dtype=torch.float32)
        positions = tensor(batch_size, num_tokens, dtype=torch.int64)
        weight = tensor(num_channels, dtype=dtype)
        rotation = tensor(num_patches, 2 * head_dim)
        attention.attend._init_fn(query, query, query, sizes.to(dtype), 0.1)
        for more in ((None, None), (sizes, positions)):
            similarity.average_alike._init_fn(x, None, weight, weight, 1e-6, dtype, *more, num_patches // 4, 1, 14)
        similarity.average_alike._init_fn(x, x, None, None, 1e-6, dtype, None, None, num_patches // 4, 1, 0)
        similarity.follow_averages._init_fn(x, x, x, positions.int())
        for turned, half in ((None, False), (rotation, False), (rotation, True)):
            published.class_attention._init_fn(query[:, :, 0], query, 0.1, 1, turned, half)
        published.select_tokens._init_fn(sizes, num_patches // 2, 1)
        published.gather_with_representative._init_fn(x, positions, sizes, True)
        published.follow._init_fn(x, x, positions.int(), x, num_patches)
        published.gather_rotations._init_fn(rotation, positions, 1, True)
        compile_launched(f'{batch_size}x{num_patches}x{num_channels}x{dtype}', capability)

    for num_tokens, width, key_dim, val_dim, num_heads, is_selection, dtype in (
            (196, 14, 16, 32, 4, False, torch.bfloat16), (99, 14, 32, 64, 4, True, torch.float16),
            (196, 14, 32, 64, 6, False, torch.float32), (16, 4, 64, 128, 16, False, torch.bfloat16),
            (784, 28, 32, 64, 6, False, torch.bfloat16)):
        table = tensor(num_heads, width ** 2, dtype=dtype)
        index = tensor(width ** 2, width ** 2, dtype=torch.int64)
        qkv = tensor(2, num_tokens, num_heads * (2 * key_dim + val_dim), dtype=dtype)
        positions = tensor(2, num_tokens - 1, dtype=torch.int64) if is_selection else None
        num_scored = num_tokens - is_selection
        how = num_heads, key_dim, val_dim, 0.1
        _, paid = levit.levit_attention._init_fn(
            qkv, qkv, *how, table, index, positions, num_scored, num_scored)
        scores = tensor(2, num_scored, dtype=torch.float32)
        levit.levit_scores._init_fn(paid, scores, num_heads * num_scored, 0.5, None, 0, 0, 1)
        if not is_selection:  # and with twice the values where the grid is downsampled
            val_dim *= 2
            query = tensor(2, (width // 2) ** 2, num_heads * key_dim, dtype=dtype)
            kv = tensor(2, num_tokens, num_heads * (key_dim + val_dim), dtype=dtype)
            _, paid = levit.levit_attention._init_fn(
                query, kv, num_heads, key_dim, val_dim, 0.1, table, index, None, num_tokens, query.shape[1])
            levit.levit_scores._init_fn(paid, scores, num_heads * query.shape[1], 0.5, table[0, :1], 0, width, 2)
        compile_launched(f'LeViT of {num_tokens}x{num_heads}x{key_dim}x{dtype}', capability)


if __name__ == '__main__':
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
