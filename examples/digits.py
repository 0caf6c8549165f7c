""" Handwritten digits: a dense model and its evolved twin, trained side by side

Trains `deit_tiny_patch16_224` and `evo_deit_tiny_patch16_224`, both shrunk to the small images that come with
scikit-learn (8x8 patch tokens, 6 blocks), in one to three minutes on two CPU cores:

    python examples/digits.py

Both start from the same weights and get the same batches, in turn, so that other work of the machine slows both.
timm-evo is imported only to count GMACs: if it is installed, timm knows its models.
"""
import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter, accuracy, random_seed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from timm_evo import count_gmacs

DENSE = 'deit_tiny_patch16_224'
EVOLVED = f'evo_{DENSE}'
INPUT_SIZE = (1, 32, 32)
MODEL_ARGS = dict(
    img_size=32, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=6, num_heads=2, weight_init='jax')
EVOLUTION_ARGS = dict(start_block=2, stage_depth=2)  # half of the defaults 4 and 4, because the depth is half of 12
BATCH_SIZE = 40
NUM_HELD_OUT = 360  # a multiple of the batch size, so that all timed batches have the same size


class Digits(Dataset):
    """Grey PIL images of one digit each; timm's `create_loader` sets the transform."""

    def __init__(self, images: list[Image.Image], targets: list[int]) -> None:
        self.images = images
        self.targets = targets
        self.transform = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.targets[index]


class Contestant:
    """A model in training, with its measurements."""

    def __init__(
            self,
            name: str,
            seed: int,
            epochs: int,
            updates_per_epoch: int,
            device: torch.device,
            **kwargs,
    ) -> None:
        random_seed(seed)  # the same initial weights for the twins
        self.name = name
        self.device = device
        self.model = timm.create_model(name, **MODEL_ARGS, **kwargs).to(device)
        self.task = ClassificationTask(self.model, device=device, verbose=False)
        self.optimizer = create_optimizer_v2(self.model, opt='muon', lr=2e-2, weight_decay=0.05)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            num_epochs=epochs,
            warmup_epochs=1,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
        self.num_updates = 0
        self.top1 = AverageMeter()
        self.train_seconds: list[float] = []
        self.inference_seconds: list[float] = []

    @contextmanager
    def _stopwatch(self, seconds: list[float]) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        seconds.append(time.perf_counter() - start)

    def _synchronize(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def train_batch(self, images: Tensor, targets: Tensor) -> None:
        self.model.train()
        with self._stopwatch(self.train_seconds):
            self.task(images, targets)['loss'].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.num_updates += 1
        self.scheduler.step_update(self.num_updates)

    @torch.inference_mode()
    def validate_batch(self, images: Tensor, targets: Tensor) -> None:
        self.model.eval()
        with self._stopwatch(self.inference_seconds):
            output = self.model(images)
        top1, = accuracy(output, targets)
        self.top1.update(top1.item(), len(targets))

    def results(self) -> dict[str, float]:
        """Accuracy in the last epoch, median throughput, and cost."""
        self.model.eval()
        return {
            'top-1': self.top1.avg,
            'train img/s': BATCH_SIZE / statistics.median(self.train_seconds),
            'infer img/s': BATCH_SIZE / statistics.median(self.inference_seconds),
            'GMACs': count_gmacs(self.model, torch.zeros(1, *INPUT_SIZE, device=self.device)),
            'params (M)': sum(p.numel() for p in self.model.parameters()) / 1e6,
        }


def create_loaders(seed: int, device: torch.device) -> tuple[DataLoader, DataLoader]:
    """Loaders of the training and the held-out images."""
    digits = load_digits()
    images = [
        Image.fromarray((pixels * (255 / 16)).astype('uint8')).resize(INPUT_SIZE[1:], Image.Resampling.BICUBIC)
        for pixels in digits.images
    ]
    targets = digits.target.tolist()
    train_images, val_images, train_targets, val_targets = train_test_split(
        images, targets, test_size=NUM_HELD_OUT, stratify=targets, random_state=seed)

    # no workers, because they would compete with the models for the cores
    common = dict(
        input_size=INPUT_SIZE, batch_size=BATCH_SIZE, mean=(0.5,), std=(0.5,), num_workers=0, device=device)
    train_loader = create_loader(
        Digits(train_images, train_targets),
        is_training=True,
        scale=(0.8, 1.0),
        hflip=0.,  # a mirrored digit is not a digit
        color_jitter=0.,
        **common,
    )
    val_loader = create_loader(Digits(val_images, val_targets), crop_pct=1.0, **common)
    return train_loader, val_loader


def train(contestants: list[Contestant], train_loader: DataLoader, val_loader: DataLoader, epochs: int) -> None:
    """Train and validate all models, batch by batch in turn."""
    with tqdm(total=epochs * (len(train_loader) + len(val_loader)), unit='batch') as progress:
        for epoch in range(epochs):
            progress.set_description(f'epoch {epoch + 1}/{epochs}')
            for images, targets in train_loader:
                for contestant in contestants:
                    contestant.train_batch(images, targets)
                progress.update()

            for contestant in contestants:
                contestant.top1.reset()
            for images, targets in val_loader:
                for contestant in contestants:
                    contestant.validate_batch(images, targets)
                progress.update()
            progress.set_postfix_str(', '.join(f'{c.name} {c.top1.avg:.1f}%' for c in contestants))


def print_table(dense: dict[str, float], evolved: dict[str, float]) -> None:
    formats = {'top-1': '.2f', 'train img/s': '.0f', 'infer img/s': '.0f', 'GMACs': '.4f', 'params (M)': '.3f'}
    print(f'\n{"":<26}' + ''.join(f'{column:>13}' for column in formats))
    for name, row in ((DENSE, dense), (EVOLVED, evolved)):
        print(f'{name:<26}' + ''.join(f'{row[column]:>13{spec}}' for column, spec in formats.items()))
    print(f'{"evolved / dense":<26}' + ''.join(f'{evolved[column] / dense[column]:>13.3f}' for column in formats))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Train a dense model and its evolved twin side by side on digits.')
    parser.add_argument('--epochs', type=int, default=6, help='passes over the training images (default: 6)')
    parser.add_argument(
        '--keep-ratio', type=float, default=0.5, help='share of the patch tokens on the slow path (default: 0.5)')
    parser.add_argument('--seed', type=int, default=0, help='seed of weights, batches and held-out images (default: 0)')
    parser.add_argument(
        '--device',
        type=torch.device,
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='device for the training (default: cuda if available, otherwise cpu)',
    )
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f'--epochs must be at least 1, not {args.epochs}')
    return args


def main() -> None:
    args = parse_args()
    train_loader, val_loader = create_loaders(args.seed, args.device)
    common = dict(seed=args.seed, epochs=args.epochs, updates_per_epoch=len(train_loader), device=args.device)
    dense = Contestant(DENSE, **common)
    evolved = Contestant(EVOLVED, **common, keep_ratio=args.keep_ratio, **EVOLUTION_ARGS)
    train([dense, evolved], train_loader, val_loader, args.epochs)
    print_table(dense.results(), evolved.results())


if __name__ == '__main__':
    main()
