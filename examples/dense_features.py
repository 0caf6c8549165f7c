""" Dense prediction: every patch of a picture gets a class, from the feature map of an evolved ViT

Trains a small model in the shape of timm's `vit_small_patch14_reg4_dinov2` (class token, registers, LayerScale) with a
linear head on its last feature map to say which handwritten digit is in the cell of each patch, or none. Dense and
evolved models see the same pictures, whose cells are scikit-learn's digits:

    python examples/dense_features.py --picture dense_features.png

Then the evolved model is asked what pruning would leave of its map: where a token was not selected in the last segment,
pruning has nothing to show, and the best guess there is "no digit". (Half of the tokens are selected. No label trains
the class token here, so they are not those that a pretrained model would choose.)
"""
import argparse

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.utils import random_seed
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, one_hot
from tqdm import tqdm

DENSE = 'vit_small_patch14_reg4_dinov2'
EVOLVED = f'evo_{DENSE}'
SIZE, CELL_SIZE, PATCH_SIZE = 64, 16, 4
DEPTH = 6
MODEL_ARGS = dict(
    img_size=SIZE, patch_size=PATCH_SIZE, in_chans=1, embed_dim=64, depth=DEPTH, num_heads=2, init_values=0.1)
NO_DIGIT = 10
NUM_CLASSES = 11
SHARE_EMPTY = 0.4
BATCH_SIZE = 32
LEARNING_RATE = 2e-2
NUM_HELD_OUT = 360  # digits that are never trained on


class Pictures:
    """Digits in some cells of a grid, and for each patch the digit of its cell."""

    def __init__(self, held_out: bool, seed: int) -> None:
        digits = load_digits()
        chosen = slice(-NUM_HELD_OUT, None) if held_out else slice(None, -NUM_HELD_OUT)
        images = torch.from_numpy(digits.images[chosen] / 16).float().unsqueeze(1)
        self.images = interpolate(images, size=CELL_SIZE, mode='bicubic').clamp(0, 1).squeeze(1)
        self.targets = torch.from_numpy(digits.target[chosen])
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Pictures (B, 1, H, W) in [-1, 1] and classes (B, H / patch, W / patch)."""
        shape = (BATCH_SIZE, SIZE // CELL_SIZE, SIZE // CELL_SIZE)
        digit = torch.randint(len(self.images), shape, generator=self.generator)
        empty = torch.rand(shape, generator=self.generator) < SHARE_EMPTY
        cells = self.images[digit].masked_fill(empty[..., None, None], 0)  # (B, rows, columns, cell, cell)
        pictures = cells.transpose(2, 3).reshape(BATCH_SIZE, 1, SIZE, SIZE)
        classes = self.targets[digit].masked_fill(empty, NO_DIGIT)
        patches = CELL_SIZE // PATCH_SIZE
        return 2 * pictures - 1, classes.repeat_interleave(patches, 1).repeat_interleave(patches, 2)


class Segmenter(nn.Module):
    """A backbone of timm's with `features_only=True`, and a linear head on its last feature map."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, features_only=True, out_indices=[DEPTH - 1], **MODEL_ARGS)
        self.head = nn.Conv2d(self.backbone.feature_info.channels()[0], NUM_CLASSES, kernel_size=1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 1, H, W) to logits of each patch (B, classes, H / patch, W / patch)."""
        return self.head(self.backbone(pictures)[0])


def train(models: dict[str, Segmenter], updates: int, seed: int) -> None:
    """Train all models with the same pictures, in turn."""
    pictures = Pictures(held_out=False, seed=seed)
    optimizers = {
        name: create_optimizer_v2(model, opt='muon', lr=LEARNING_RATE, weight_decay=0.05)
        for name, model in models.items()}
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=updates)
        for optimizer in optimizers.values()]
    with tqdm(range(updates), unit='update') as progress:
        for _ in progress:
            images, classes = pictures.batch()
            losses = {}
            for name, model in models.items():
                loss = cross_entropy(model(images), classes)
                loss.backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
                losses[name] = loss.item()
            for scheduler in schedulers:
                scheduler.step()
            progress.set_postfix_str(', '.join(f'{name} {loss:.2f}' for name, loss in losses.items()), refresh=False)


def find_selected(model: Segmenter, images: Tensor) -> Tensor:
    """Where the last selection has selected (B, H / patch, W / patch)."""
    vit = model.backbone.model
    last_selection = max(i for i, begins in enumerate(vit.schedule.begins) if begins)
    before, after = vit.forward_intermediates(
        images, indices=[last_selection - 1, DEPTH - 1], output_fmt='NLC', intermediates_only=True)
    moved = after - before  # alike for all that were not selected, by what the representative token has learned
    distance = torch.cdist(moved, moved, compute_mode='donot_use_mm_for_euclid_dist')
    selected = (distance < 1e-4 * distance.amax()).sum(dim=2) == 1
    return selected.unflatten(1, (SIZE // PATCH_SIZE, SIZE // PATCH_SIZE))


def mean_iou(predicted: Tensor, classes: Tensor) -> float:
    """Intersection over union of each class, averaged."""
    predicted, classes = (one_hot(x, NUM_CLASSES).flatten(0, 2).bool() for x in (predicted, classes))
    union = (predicted | classes).sum(dim=0)
    return ((predicted & classes).sum(dim=0)[union > 0] / union[union > 0]).mean().item()


@torch.inference_mode()
def evaluate(models: dict[str, Segmenter], batches: int, seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Predictions on pictures of held-out digits, their classes, and the pictures."""
    pictures = Pictures(held_out=True, seed=seed)
    predictions = {name: [] for name in (*models, 'pruned')}
    images, classes = zip(*(pictures.batch() for _ in range(batches)), strict=True)
    for x in images:
        for name, model in models.items():
            predictions[name].append(model.eval()(x).argmax(dim=1))
        selected = find_selected(models['evolved'], x)
        predictions['pruned'].append(torch.where(selected, predictions['evolved'][-1], NO_DIGIT))
    return {name: torch.cat(maps) for name, maps in predictions.items()}, torch.cat(classes), torch.cat(images)


def draw(file: str, images: Tensor, maps: list[Tensor], rows: int = 4) -> None:
    """A row per picture: the picture, and maps of classes in colour."""
    colours = torch.tensor([
        [230, 25, 75], [60, 180, 75], [255, 225, 25], [67, 99, 216], [245, 130, 49], [145, 30, 180], [66, 212, 244],
        [240, 50, 230], [191, 239, 69], [250, 190, 212], [0, 0, 0]], dtype=torch.uint8)
    grey = ((images[:rows] + 1) * 127.5).byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    columns = [grey] + [
        colours[classes[:rows]].repeat_interleave(PATCH_SIZE, 1).repeat_interleave(PATCH_SIZE, 2) for classes in maps]
    picture = torch.cat([torch.cat(list(column), dim=0) for column in columns], dim=1)
    Image.fromarray(picture.numpy()).resize((3 * picture.shape[1], 3 * picture.shape[0]), Image.NEAREST).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description='Classify each patch by the features of a dense and an evolved ViT.')
    parser.add_argument('--updates', type=int, default=300, help='updates of each model (default: 300)')
    parser.add_argument('--seed', type=int, default=0, help='of weights and pictures (default: 0)')
    parser.add_argument('--picture', metavar='FILE', help='draw pictures and maps to a PNG file')
    args = parser.parse_args()

    models = {}
    for label, name in (('dense', DENSE), ('evolved', EVOLVED)):
        random_seed(args.seed)  # the same initial weights
        models[label] = Segmenter(name)
    train(models, args.updates, args.seed)
    predictions, classes, images = evaluate(models, batches=10, seed=args.seed + 1)

    print(f'\n{"":<44}{"patches right":>15}{"mean IoU":>11}')
    names = {'dense': DENSE, 'evolved': EVOLVED, 'pruned': 'the same, only where tokens were selected'}
    for label, predicted in predictions.items():
        right = 100 * (predicted == classes).float().mean().item()
        print(f'{names[label]:<44}{right:>14.1f}%{100 * mean_iou(predicted, classes):>10.1f}%')
    if args.picture:
        draw(args.picture, images, [classes, *predictions.values()])
        print(f'\n{args.picture}: picture, classes, and what {", ".join(predictions)} say')


if __name__ == '__main__':
    main()
