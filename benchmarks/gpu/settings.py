""" Settings that `on_gpu.py` times: models, image sizes, batches, and their variants """
import json
from dataclasses import asdict, dataclass

OFF = ', kernels off'  # end of the name of a variant that runs with TIMM_EVO_KERNELS=0
DENSE, PRODUCT, TOME, EVIT = 'dense', 'dense, product', 'ToMe, r = 11', 'EViT, 0.7'
EVOLVED = ('stage', 'similarity')
ALL = (DENSE, PRODUCT, *EVOLVED, *(f'{name}{OFF}' for name in EVOLVED))
OTHERS = (*ALL, TOME, EVIT)
LEVIT = (DENSE, 'stage')
TRAINED = (DENSE, 'stage', 'layer', 'similarity')


@dataclass(frozen=True)
class Setting:
    """A setting that is timed in each of its variants.

    Attributes:
        step: Step of `on_gpu.py` that measures it.
        model: timm's dense model.
        batch: Number of images in a batch.
        img_size: Image size; None for the model's own.
        mode: Mode of torch.compile; None for eager.
        train: Whether it is training with mixed precision, instead of inference in bfloat16.
        variants: Names of the variants. The dense model is the first.
        small: Whether the model is made smaller, to try a step on a CPU.
        profiled: Whether to write the kernels that take the most time.
    """
    step: str
    model: str
    batch: int
    img_size: int | None = None
    mode: str | None = None
    train: bool = False
    variants: tuple[str, ...] = ALL
    small: bool = False
    profiled: bool = False

    def where(self) -> dict:
        """Values for the records that are the same in all variants that are compared."""
        keys = ('step', 'model', 'batch', 'img_size', 'mode', 'train')
        return {key: value for key, value in asdict(self).items() if key in keys}

    def label(self) -> str:
        size = f' {self.img_size}' if self.img_size else ''
        return f'{self.model}{size}, {self.batch} images' if self.batch > 1 else f'{self.model}{size}, one image'

    @staticmethod
    def from_dict(values: dict) -> 'Setting':
        return Setting(**values | {'variants': tuple(values['variants'])})


def identity(where: dict) -> str:
    """A key of the settings that can be compared."""
    return json.dumps([where[key] for key in ('step', 'model', 'batch', 'img_size', 'mode', 'train')])


DEIT_T, DEIT_S, DEIT_B = (f'deit_{size}_patch16_224' for size in ('tiny', 'small', 'base'))
DINOV2_S, DINOV2_B = (f'vit_{size}_patch14_dinov2' for size in ('small', 'base'))  # 518 pixels
DINOV3_B, VIT_L = 'vit_base_patch16_dinov3', 'vit_large_patch16_384'
GRAPHS = 'reduce-overhead'

# The most important settings come first. Models with similar compilation times are next to each other.
SETTINGS = [
    Setting('compiled', DEIT_S, 256, mode='default', profiled=True),
    Setting('compiled', DEIT_S, 64, 384, mode='default'),
    Setting('compiled', DINOV2_S, 32, mode='default', profiled=True),
    Setting('compiled', DEIT_B, 256, mode='default'),
    Setting('compiled', DEIT_B, 64, 384, mode='default'),
    Setting('compiled', DINOV2_B, 32, mode='default'),
    Setting('compiled', DINOV3_B, 32, 512, mode='default'),
    Setting('compiled', VIT_L, 16, mode='default'),
    Setting('compiled', DEIT_T, 256, mode='default'),
    Setting('compiled', DEIT_T, 64, 384, mode='default'),
    *(Setting('graphs', model, 1, mode=GRAPHS) for model in (DEIT_S, DEIT_B, DINOV2_S)),
    *(Setting('eager', model, 256, variants=OTHERS) for model in (DEIT_S, DEIT_B, DEIT_T)),
    Setting('eager', DEIT_B, 64, 384, variants=OTHERS),
    Setting('eager', DINOV2_S, 32),
    Setting('eager', DINOV3_B, 32, 512),
    Setting('eager', VIT_L, 16),
    *(Setting('eager', f'levit_{size}', 256, variants=LEVIT) for size in ('128s', '256', '384')),
    *(Setting('eager', model, 1, variants=OTHERS) for model in (DEIT_S, DEIT_B)),
    Setting('training', DEIT_S, 256, mode='default', train=True, variants=TRAINED),
    Setting('training', DEIT_S, 256, train=True, variants=TRAINED),
]

# The same steps on a CPU within minutes. The times have no meaning; the run shows that the steps work.
QUICK = [
    Setting('compiled', DEIT_T, 2, mode='default', variants=(DENSE, 'similarity'), small=True, profiled=True),
    Setting('graphs', DEIT_T, 1, mode=GRAPHS, variants=(DENSE,), small=True),
    Setting('eager', DEIT_T, 2, 64, variants=OTHERS, small=True),
    Setting('eager', 'levit_128s', 2, variants=LEVIT, small=True),
    Setting('training', DEIT_T, 2, mode='default', train=True, variants=(DENSE, 'similarity'), small=True),
    Setting('training', DEIT_T, 2, train=True, variants=TRAINED, small=True),
]
