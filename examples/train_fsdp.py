""" Training with sharded weights (FSDP2): torchrun --nproc_per_node 8 examples/train_fsdp.py --data-dir images ...

The same command continues from the newest checkpoint in --output (shared by all processes), on any number of processes.
Images, augmentation and mixup depend only on seed and update, so losses are the same as without an interruption.
"""
import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from timm.data import Mixup, create_dataset, create_transform, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ParseKwargs, random_seed
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
for name, default, text in [
        ('data-dir', Path('images'), 'has train/<class>/<image>'), ('output', Path('output'), 'checkpoints and logs'),
        ('model', 'evo_deit_small_patch16_224', 'a ViT'), ('batch-size', 256, 'of all processes together'),
        ('epochs', 300, 'number of epochs'), ('lr', 5e-4, 'learning rate'), ('clip-grad', float('inf'), 'largest norm'),
        ('save-every', 1000, 'updates'), ('workers', 4, 'per process'), ('seed', 0, 'random seed')]:
    parser.add_argument(f'--{name}', type=type(default), default=default, help=text)
for name in ('pretrained', 'bfloat16', 'grad-checkpointing', 'compile'):
    parser.add_argument(f'--{name}', action='store_true')
for name in ('model', 'transform', 'mixup', 'optimizer', 'scheduler'):  # arguments of timm's functions
    parser.add_argument(f'--{name}-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='NAME=VALUE')
CAN_CHANGE = {'data_dir', 'output', 'save_every', 'workers', 'grad_checkpointing', 'compile'}  # when it is resumed
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def seed_by(*key: int) -> None:
    random_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


class Stream(Dataset):
    """The images of all epochs as one sequence. Each has its own seed, which does not depend on process or worker."""

    def __init__(self, images: Dataset, epoch_size: int, seed: int) -> None:
        self.images, self.epoch_size, self.seed, self.epoch = images, epoch_size, seed, -1

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        epoch, place = divmod(position, self.epoch_size)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
        seed_by(self.seed, 0, position)
        return self.images[int(self.order[place])]


def save(folder: Path, update: int, settings: dict, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint, which appears only when it is complete, and delete all but the two newest."""
    state = dict(zip(('model', 'optimizer'), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=folder / 'unfinished')
    dist.barrier()  # all processes have written
    if dist.get_rank() == 0:
        (folder / 'unfinished/settings.json').write_text(json.dumps(settings))
        (folder / 'unfinished').rename(folder / f'{update:08}')
        for old in sorted(folder.glob('[0-9]*'))[:-2]:
            shutil.rmtree(old)  # after an interruption, a part of an old one may remain, but the newest is complete


def resume(folder: Path, settings: dict, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint, if there is one, and return the number of its updates."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder / 'unfinished', ignore_errors=True)
    found = [max(folder.glob('[0-9]*'), default=None)]
    dist.broadcast_object_list(found)  # processes may not see changes of a shared folder at the same time
    if found[0] is None:
        return 0
    for name, value in json.loads((found[0] / 'settings.json').read_text()).items():
        if json.dumps(settings[name]) != json.dumps(value):
            raise SystemExit(f'{found[0]} has {name} = {value}, not {settings[name]}. Use another --output.')
    state = dict(zip(('model', 'optimizer'), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=found[0])
    set_state_dict(model, optimizer, model_state_dict=state['model'], optim_state_dict=state['optimizer'])
    return int(found[0].name)


def main() -> None:
    args = parser.parse_args()
    processes = int(os.environ.get('WORLD_SIZE') or parser.error('start this with torchrun, with one process per GPU'))
    if not (args.data_dir / 'train').is_dir():
        parser.error(f'--data-dir must have a folder train, but there is no {args.data_dir / "train"}')
    images = create_dataset('', root=args.data_dir, split='train')
    if not 1 <= args.batch_size <= len(images) or args.batch_size % (2 * processes):  # mixup mixes two images
        parser.error(f'--batch-size must be a multiple of {2 * processes}, and at most the {len(images)} images')
    steps, num_classes = len(images) // args.batch_size, len(images.reader.class_to_idx)
    args.output.mkdir(parents=True, exist_ok=True)
    seed_by(args.seed)  # the same weights in all processes
    model = timm.create_model(args.model, args.pretrained, num_classes=num_classes, **args.model_kwargs).train()
    blocks = getattr(model, 'blocks', None) or parser.error(f'--model must be a ViT, but {args.model} has no blocks')
    data_config = resolve_data_config(args.model_kwargs, model=model)
    images.transform = create_transform(**data_config | {'is_training': True} | args.transform_kwargs)
    if DEVICE == 'cuda':
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    dist.init_process_group('nccl' if DEVICE == 'cuda' else 'gloo')
    rank, mesh = dist.get_rank(), dist.init_device_mesh(DEVICE, (processes,))
    policy = MixedPrecisionPolicy(torch.bfloat16 if args.bfloat16 else None, reduce_dtype=torch.float32)
    model.set_grad_checkpointing(args.grad_checkpointing)
    for block in blocks:
        if args.compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = create_optimizer_v2(model, lr=args.lr, **{'opt': 'adamw', 'weight_decay': 0.05} | args.optimizer_kwargs)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=args.epochs, step_on_epochs=False, updates_per_epoch=steps, **args.scheduler_kwargs)
    settings = {name: value for name, value in vars(args).items() if name not in CAN_CHANGE} | {'images': len(images)}
    start, total, size = resume(args.output, settings, model, optimizer), args.epochs * steps, args.batch_size
    mixup = Mixup(**{'mixup_alpha': 0.} | args.mixup_kwargs, num_classes=num_classes)
    mixup.mixup_enabled = mixup.mixup_alpha > 0 or mixup.cutmix_alpha > 0  # otherwise it only smoothes the labels
    places = [i for i in range(size) if min(i, size - 1 - i) * 2 * processes // size == rank]  # pairs that mixup mixes
    batches = ([update * size + place for place in places] for update in range(start, total))
    stream = Stream(images, steps * size, args.seed)
    loader = DataLoader(stream, batch_sampler=batches, num_workers=args.workers, pin_memory=DEVICE == 'cuda')
    log = open(args.output / 'losses.jsonl' if rank == 0 else os.devnull, 'a')
    progress = tqdm(loader, initial=start, total=total, disable=rank > 0)
    for update, (inputs, targets) in enumerate(progress, start + 1):
        scheduler.step_update(update - 1)
        seed_by(args.seed, 1, update)
        inputs, targets = mixup(inputs.to(DEVICE, non_blocking=True), targets.to(DEVICE, non_blocking=True))
        seed_by(args.seed, 2, update, rank)  # for dropout
        selections = sum(model.schedule.begins) if hasattr(model, 'schedule') else None
        loss = SoftTargetCrossEntropy()(model(inputs).float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach() / processes)
        seen = dict(update=update, loss=loss.item(), lr=optimizer.param_groups[0]['lr'], selections=selections)
        progress.set_postfix(seen, refresh=False)
        print(json.dumps(seen), file=log, flush=True)
        if update % args.save_every == 0 or update == total:
            save(args.output, update, settings, model, optimizer)
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
