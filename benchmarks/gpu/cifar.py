""" Step 'cifar': training on CIFAR-10 from scratch, dense and evolved, with several seeds and all images on the GPU

Models have DeiT-T's width and depth, images of 32 pixels, and 64 patches of 4 pixels. They are trained with mixed
precision in bfloat16, AdamW, one cycle of the learning rate, flips, shifts and label smoothing. The result is top-1 on
all test images. Several trainings share the GPU, so their seconds do not measure speed.
"""
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

import timm_evo

from .jobs import POLL, Job, Process
from .settings import DENSE

STEP = 'cifar'
LAYER_TO_STAGE, SIMILARITY = 'layer-to-stage', 'similarity'
VARIANTS = (DENSE, LAYER_TO_STAGE, SIMILARITY)
LAYERWISE_SHARE = 2 / 3  # share of the updates, as in the authors' training
SEEDS = (0, 1, 2)
EPOCHS, BATCH, LEARNING_RATE = 30, 512, 1.5e-3
QUICK_EPOCHS, QUICK_BATCH = 1, 8
TOGETHER = 3  # trainings that share the GPU
MODEL, PIXELS, PATCH, SHIFT = 'deit_tiny_patch16_224', 32, 4, 4


def read_split(folder: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) as bytes and classes (N,), from a folder with one folder of images per class."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = [(file, label) for label, name in enumerate(names) for file in sorted((folder / name).iterdir())]

    def read(file: Path) -> np.ndarray:
        with Image.open(file) as image:
            return np.asarray(image.convert('RGB'))
    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(read, [file for file, _ in files])))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in files])


def augment(images: Tensor) -> Tensor:
    """Images (B, 3, S, S), each flipped or not and shifted by its own number of pixels."""
    B, _, size, _ = images.shape
    device = images.device
    flipped = torch.where(torch.rand(B, 1, 1, 1, device=device) < 0.5, images.flip(3), images)
    padded = F.pad(flipped, (SHIFT,) * 4)
    begins = torch.randint(0, 2 * SHIFT + 1, (2, B, 1), device=device)
    rows, columns = begins + torch.arange(size, device=device)  # (B, S) each
    which = torch.arange(B, device=device)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def build(variant: str, num_updates: int, num_classes: int) -> nn.Module:
    model = timm.create_model(MODEL, img_size=PIXELS, patch_size=PATCH, num_classes=num_classes, drop_path_rate=0.1)
    if variant == LAYER_TO_STAGE:
        return timm_evo.evolve(model, selection='stage', layerwise_updates=round(LAYERWISE_SHARE * num_updates))
    return model if variant == DENSE else timm_evo.evolve(model, selection=variant)


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, labels: Tensor, normalise: Callable[[Tensor], Tensor]) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    with torch.autocast(images.device.type, torch.bfloat16):
        right = sum(
            (model(normalise(part)).argmax(dim=1) == classes).sum().item()
            for part, classes in zip(images.split(1000), labels.split(1000), strict=True))
    return 100 * right / len(images)


def train(variant: str, seed: int, data: dict[str, tuple[Tensor, Tensor]], quick: bool) -> dict:
    """Run a training, and return top-1 of the model and of the same weights after `restore`."""
    images, labels = data['train']
    device = images.device
    epochs, batch = (QUICK_EPOCHS, QUICK_BATCH) if quick else (EPOCHS, BATCH)
    steps = len(images) // batch
    mean, std = (value.view(1, 3, 1, 1) for value in channel_statistics(images))

    def normalise(part: Tensor) -> Tensor:
        return (part.float() - mean) / std
    torch.manual_seed(seed)
    model = build(variant, epochs * steps, int(labels.max()) + 1).to(device)
    forward = model if quick else torch.compile(model, dynamic=False)
    groups = param_groups_weight_decay(model, 0.05, model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, fused=device.type == 'cuda')
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, epochs * steps, pct_start=0.15)
    begin = time.monotonic()
    for _ in range(epochs):
        model.train()
        for part in torch.randperm(len(images), device=device)[:steps * batch].view(steps, batch):
            with torch.autocast(device.type, torch.bfloat16):
                logits = forward(augment(normalise(images[part])))
                loss = F.cross_entropy(logits, labels[part], label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    values = {
        'loss': loss.item(), 'seconds': time.monotonic() - begin, 'epochs': epochs, 'batch': batch,
        'updates': epochs * steps, 'test_images': len(data['test'][0]),
        'top1': top1(model, *data['test'], normalise)}
    if variant != DENSE:
        values['top1_dense_again'] = top1(timm_evo.restore(model), *data['test'], normalise)
    return values


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,) of bytes, without converting all of them to floats at once."""
    parts = [part.float() for part in images.split(5000)]
    mean = torch.stack([part.sum(dim=(0, 2, 3)) for part in parts]).sum(dim=0) / (images.numel() / 3)
    squares = torch.stack([part.square().sum(dim=(0, 2, 3)) for part in parts]).sum(dim=0) / (images.numel() / 3)
    return mean, (squares - mean.square()).sqrt()


def find_runs(known: list[dict], quick: bool) -> Iterator[tuple[str, int]]:
    """Trainings that are missing. All variants of a seed come before the next seed."""
    done = {(record['variant'], record['seed']) for record in known if record['kind'] == 'trained'}
    for seed in SEEDS[:1] if quick else SEEDS:
        for variant in VARIANTS:
            if (variant, seed) not in done:
                yield variant, seed


def measure(job: Job, known: list[dict], images: Path, seconds: float, report: Callable[[], None]) -> None:
    """Do the missing trainings, some of them in parallel, until the time is over.

    Args:
        job: Job of this run.
        known: Records that are comparable with this run.
        images: Folder with train/ and test/.
        seconds: Time limit.
        report: Function that is called repeatedly.
    """
    end = time.monotonic() + seconds
    waiting, running = list(find_runs(known, job.quick)), []
    if not waiting:
        return
    data = Path(job.folder) / 'cifar.pt'
    torch.save({split: read_split(images / split) for split in ('train', 'test')}, data)
    together = 1 if job.device == 'cpu' else TOGETHER
    try:
        while (waiting or running) and time.monotonic() < end:
            for what, process in running:
                if process.status():
                    job.failed(STEP, f'{what[0]}, seed {what[1]}', process.said())
            running = [(what, process) for what, process in running if process.status() is None]
            while waiting and len(running) < together:
                what = waiting.pop(0)
                own = replace(job, more={'data': str(data), 'what': what})
                log = Path(job.folder) / f'cifar.{what[0]}.{what[1]}.log'
                running.append((what, Process(['-m', 'gpu.cifar', own.to_text()], log)))
            report()
            time.sleep(POLL)
    finally:
        for what, process in running:
            if process.status() is None:
                job.failed(STEP, f'{what[0]}, seed {what[1]}', f'stopped after {seconds:.0f} s')
            process.stop()


def main() -> None:
    job = Job.from_text(sys.argv[1])
    variant, seed = job.more['what']
    if job.device == 'cpu':
        torch.set_num_threads(1)
    data = {
        split: tuple(tensor.to(job.device) for tensor in tensors)
        for split, tensors in torch.load(job.more['data'], weights_only=True).items()}
    values = train(variant, seed, data, job.quick)
    print(json.dumps(values))
    job.record('trained', step=STEP, variant=variant, seed=seed, **values)


if __name__ == '__main__':
    main()
