""" DeiT-Ti as the measurements have it, one checkpoint from a public repository of one file per tensor

    git clone https://github.com/wvfunc/matlab-bit_true-deit_tiny-fix
    python benchmarks/deit_tiny_weights.py --clone matlab-bit_true-deit_tiny-fix --output deit_tiny_in1k.safetensors

It was trained on ImageNet-1k. Its 25 layer norms are rounded to steps of 1/32 and 1/64, and all other tensors are as
trained. They are saved in float16. The repository is under Apache-2.0; the measurements have its commit 80f2a91.
"""
import argparse
import re
from pathlib import Path

import timm
import torch
from common.arguments import output_file
from safetensors.torch import save_file
from scipy.io import loadmat

NAMES = {  # of files, and of tensors in timm
    r'(head|patch_embed_proj)_(weight|bias)': r'\1.\2',
    r'blocks_(\d+)_(attn|mlp)_(\w+?)_(weight|bias)': r'blocks.\1.\2.\3.\4',
    r'p_cls_token': 'cls_token',
    r'p_pos_embed': 'pos_embed',
}


def tensor_name(file: str) -> str | None:
    """Name of the tensor of a file; None for the few files of activations."""
    if norm := re.match(r'cpu_p_qudq_(\d+)_LN_(weight|bias)', file):  # two per block, and the last one
        block, which = divmod(int(norm[1]), 2)
        return f'norm.{norm[2]}' if block == 12 else f'blocks.{block}.norm{which + 1}.{norm[2]}'
    for pattern, name in NAMES.items():
        if found := re.match(pattern, file):
            return found.expand(name).replace('patch_embed_proj', 'patch_embed.proj')
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description='Make one checkpoint of DeiT-Ti from a public repository.')
    parser.add_argument('--clone', type=Path, required=True, metavar='FOLDER', help='clone of the repository')
    parser.add_argument('--output', type=output_file, required=True, metavar='FILE', help='.safetensors file to write')
    args = parser.parse_args()

    model = timm.create_model('deit_tiny_patch16_224')
    files = sorted((args.clone / 'mat_extract').rglob('*.mat'))
    found = {name: file for file in files if (name := tensor_name(file.name)) is not None}
    if found.keys() != (expected := model.state_dict()).keys():
        raise SystemExit(f'--clone: {args.clone} has {len(found)} tensors of DeiT-Ti, not {len(expected)}')
    state_dict = {
        name: torch.from_numpy(loadmat(found[name])['data']).reshape(tensor.shape).half().contiguous()
        for name, tensor in expected.items()}
    save_file(state_dict, args.output)


if __name__ == '__main__':
    main()
