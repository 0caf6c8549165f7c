""" Step 'equal': comparison of the results with and without kernels on this device """
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from common.measuring import DTYPES
from torch import Tensor, nn

import timm_evo

from . import records
from .jobs import Job
from .models import kernels

WITHOUT, WITH = '0', '1'  # values of TIMM_EVO_KERNELS
MODELS = {  # image sizes; one of each has an odd number of columns, for which the checkerboard differs
    'deit_tiny_patch16_224': (224, 112),
    'vit_small_patch14_reg4_dinov2': (154, (126, 168)),
    'vit_small_patch16_dinov3': (224, (128, 208)),
    'eva02_tiny_patch14_224': (154, 112),
}
SELECTIONS = ('similarity', 'stage')
BATCH_SIZES = (1, 5)
CUT = dict(embed_dim=48, num_heads=3, depth=4)
CUT_SIZES = (32, (24, 40))  # of patches of 8 pixels
TOLERANCE = {'float32': 1e-4, 'bfloat16': 0.1}  # shares of the largest logit


@dataclass(frozen=True)
class Case:
    """A model and an input for a comparison."""
    model: str
    img_size: tuple[int, int]
    selection: str
    dtype: str
    batch: int


def find_cases(quick: bool) -> list[Case]:
    cases = []
    for model, sizes in MODELS.items():
        for size in CUT_SIZES if quick else sizes:
            height, width = (size, size) if isinstance(size, int) else size
            cases += [
                Case(model, (height, width), selection, dtype, batch)
                for selection in SELECTIONS for dtype in TOLERANCE for batch in BATCH_SIZES]
    return cases[::2] if quick else cases  # one batch size


def build(case: Case, device: torch.device, quick: bool) -> nn.Module:
    """An evolved model in which every layer changes the logits, which is not the case for initial weights."""
    torch.manual_seed(0)
    cut = dict(CUT, patch_size=8) if quick else {}
    model = timm.create_model(case.model, img_size=case.img_size, num_classes=100, **cut)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition('.')[2] in ('gamma', 'gamma_1', 'gamma_2'):
                parameter.fill_(0.5)
            else:
                parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    return timm_evo.evolve(model, selection=case.selection).eval().to(device, DTYPES[case.dtype])


@torch.inference_mode()
def run(model: nn.Module, images: Tensor, value: str) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the patch that each patch follows after each selection."""
    with kernels(value):
        return model(images).float(), [selection.follows for selection in timm_evo.trace(model, images)]


@torch.inference_mode()
def compare(case: Case, device: torch.device, quick: bool) -> dict:
    """Differences of logits and kept tokens.

    Returns:
        `difference`, of the logits with and without kernels, and `alone`, of an image alone and in the batch with
        kernels, both as shares of the largest logit; `same_tokens`, the share of patches that follow the same token;
        `same_bits`, whether two calls with kernels are identical; `limit`, the largest difference that is allowed.
    """
    model = build(case, device, quick)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, *case.img_size, generator=generator).to(device, DTYPES[case.dtype])
    expected, expected_follows = run(model, images, WITHOUT)
    logits, follows = run(model, images, WITH)
    again, _ = run(model, images, WITH)
    with kernels(WITH):
        alone = torch.cat([model(image.unsqueeze(0)).float() for image in images])
    scale = expected.abs().max().item()
    if not logits.isfinite().all() or len(follows) != len(expected_follows):
        raise ValueError('The logits are not finite, or the numbers of selections differ.')
    same = torch.cat([(a == b).float().flatten() for a, b in zip(follows, expected_follows, strict=True)])
    return {
        'difference': (logits - expected).abs().max().item() / scale,
        'alone': (logits - alone).abs().max().item() / scale,
        'same_tokens': same.mean().item(),
        'same_bits': torch.equal(logits, again),
        'limit': TOLERANCE[case.dtype],
    }


def main() -> None:
    job = Job.from_text(sys.argv[1])
    known = [record for record in records.read(Path(job.results)) if record['run'] in job.more['runs']]
    done = {record['case'] for record in known if record['kind'] == 'equal'}
    for case in find_cases(job.quick):
        values = asdict(case)
        name = ', '.join(map(str, values.values()))
        if name in done:
            continue
        try:
            job.record('equal', step='equal', case=name, **values, **compare(case, torch.device(job.device), job.quick))
        except Exception as error:
            job.failed('equal', name, error)
            if job.device == 'cuda' and 'CUDA error' in str(error):
                raise  # after this error, CUDA no longer works


if __name__ == '__main__':
    main()
