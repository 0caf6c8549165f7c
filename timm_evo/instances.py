""" Token evolution for models that are there already """
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, cast

from timm.models import is_model
from timm.models.eva import Eva
from timm.models.levit import Levit
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils import parametrize

from . import eva, levit, vision_transformer
from .arguments import argument_names, plain
from .evolved_model import Evolved, architecture, attribute_names, change_class, find_evolved

__all__ = ['evolve', 'evolved', 'restore']


def evolve(
        model: nn.Module,
        *,
        keep_ratio: float | Sequence[float] = 0.5,
        start_block: int | None = None,
        stage_depth: int | None = None,
        selection: str | None = None,
        tradeoff: float | Sequence[float] | None = None,
        fast_update: bool = True,
        class_head: bool = False,
        learn_tradeoff: bool = False,
        layerwise_updates: int = 0,
        **misspelt: NoReturn,
) -> Evolved:
    """Give token evolution to a dense timm model, in place.

    Args:
        model: A `VisionTransformer`, an `Eva` or a `Levit`, or of a subclass that leaves its forward pass as it is.
        keep_ratio: Share of the patch tokens on the slow path, in (0, 1]; one number, or one per segment (per block in
            'similarity'). 1.0 is exactly the dense model.
        start_block: First block that evolves, at least 1. None for a third of the depth (1 in 'similarity', 2 of a
            LeViT).
        stage_depth: Blocks per segment of a ViT, for selection='stage'. None for half of the blocks that evolve.
        selection: 'similarity', for weights that were trained without token evolution; 'stage' or 'layer', as
            published. None for 'similarity', or 'stage' of a LeViT.
        tradeoff: Share alpha in [0, 1] of a block's class attention in the scores, for a published selection; one
            number, or one per block. None for 0.5.
        fast_update: Update placeholder tokens through the representative token; if False they are only preserved, for
            a published selection.
        class_head: Second head on the class token beside a patch-mean head.
        learn_tradeoff: Learn alpha, one scalar per attention of a LeViT.
        layerwise_updates: For selection='stage': number of optimizer updates with a selection per block before.
        **misspelt: None; refused, and the nearest name is named.

    Returns:
        The same object, its class changed to the evolved one; weights, device and mode as they were.

    Raises:
        TypeError: The model is of another class, or has blocks that cannot be evolved; or an argument is not known.
        ValueError: An argument is outside what is allowed.
    """
    evolved_cls = _evolved_class(model)
    if issubclass(evolved_cls, levit.LevitEvolution) and misspelt.get('class_token'):
        raise ValueError(
            'class_token=True is not allowed for a model that is there, its attentions would lose their biases. Create '
            "the published scheme by timm.create_model('evo_levit_cls_*').")
    arguments = dict(
        keep_ratio=keep_ratio, start_block=start_block, stage_depth=stage_depth, selection=selection,
        tradeoff=tradeoff, fast_update=fast_update, class_head=class_head, learn_tradeoff=learn_tradeoff,
        layerwise_updates=layerwise_updates)
    # what is left at its default is left to the family, which may have another one, or no such argument
    arguments = {name: value for name, value in plain(arguments).items() if not _is_default(name, value)} | misspelt
    evolved_cls.check_names(arguments, argument_names(evolved_cls, ['init_evolution']))
    dense = attribute_names(model)
    change_class(model, lambda dense_cls: evolved_cls)
    model = cast(Evolved, model)
    try:
        model.dense_architecture = architecture(model)
        model.init_evolution(**arguments)
    except BaseException:
        model._take_evolution_away(attribute_names(model) - dense)
        raise
    return model


def restore(model: Evolved) -> nn.Module:
    """Take token evolution away again, in place: the dense model with the weights as they are now.

    Args:
        model: A model of `evolve` or `timm.create_model('evo_*')`.

    Returns:
        The same object, its class changed to timm's. Without a class head and learned trade-offs, if it had some.

    Raises:
        TypeError: The model is not evolved, or wraps one that is.
        ValueError: It has a class token in the place of LeViT's biases, so there is no dense model of it.
    """
    if not isinstance(model, Evolved):
        found = find_evolved(model) if isinstance(model, nn.Module) else None
        if found is not None:
            raise TypeError(
                f'{type(model).__name__} is not evolved itself, it has an evolved model as {_path(found[0])}: '
                'restore that.')
        raise TypeError(f'{type(model).__name__} is not evolved, there is nothing to restore.')
    model._check_restorable()
    dense_architecture, evolution_args = model.dense_architecture, model.evolution.keys() | model.WEIGHTED_ARGUMENTS
    model._take_evolution_away(model._added)
    if is_model(dense_architecture) and dense_architecture != architecture(model):  # what timm saves is dense, too
        model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | {'architecture': dense_architecture}
        if hasattr(model, '_model_args'):
            model._model_args = {k: v for k, v in model._model_args.items() if k not in evolution_args}
    return model


@contextmanager
def evolved(model: nn.Module, **arguments) -> Iterator[Evolved]:
    """Evolve a model for a while, or an evolved model in another way: `with timm_evo.evolved(model, keep_ratio=0.7):`.

    Args:
        model: A dense model as `evolve` takes it, or an evolved one. It is as it was afterwards.
        **arguments: Those of `evolve`, or those of `set_evolution` for an evolved model.

    Yields:
        The same object.

    Raises:
        TypeError: As `evolve` or `set_evolution`.
        ValueError: Likewise.
    """
    if not isinstance(model, Evolved):
        model = evolve(model, **arguments)
        try:
            yield model
        finally:
            restore(model)
        return
    before, model_args = model.evolution, getattr(model, '_model_args', None)
    model.set_evolution(**arguments)
    try:
        yield model
    finally:
        model.set_evolution(**before)
        if model_args is not None:
            model._model_args = model_args


def _is_default(name: str, value: object) -> bool:
    default = evolve.__kwdefaults__[name]  # pyright: ignore[reportOptionalSubscript]  # it has some
    return type(value) is type(default) and value == default  # 1 is no True


def _path(name: str) -> str:
    return f'`.{name}`'


def _evolved_class(model: nn.Module) -> type[Evolved]:
    """The class to give to a model; refuses what has none, with the reason."""
    if isinstance(model, str):
        raise TypeError(
            f'evolve takes a model, not its name {model!r}. timm.create_model makes one that is evolved: evo_* names '
            'are those that timm_evo adds to timm.')
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f'evolve takes a model, a torch.nn.Module, not {name}.')
    if isinstance(model, Evolved):
        raise TypeError(f'{name} is evolved already, its set_evolution changes the arguments.')
    dense_cls = parametrize.type_before_parametrizations(model)
    if issubclass(dense_cls, VisionTransformer):
        return vision_transformer.evolved_class(dense_cls)
    if issubclass(dense_cls, Eva):
        return eva.evolved_class(dense_cls)
    if issubclass(dense_cls, Levit):
        return levit.evolved_class(dense_cls)
    for path, module in model.named_modules():
        if isinstance(module, Evolved):
            raise TypeError(f'{name} has a model in it that is evolved already, {_path(path)}.')
        if isinstance(module, (VisionTransformer, Eva, Levit)):
            raise TypeError(
                f'{name} cannot be evolved, but the {type(module).__name__} in it can, which is {_path(path)}: evolve '
                'that, before it is compiled.')
    raise TypeError(f'{name} cannot be evolved, {_reason(model)}. VisionTransformer, Eva, Levit and their '
                    'subclasses in timm can.')


def _reason(model: nn.Module) -> str:
    names = ' '.join(name for name, _ in [*model.named_parameters(), *model.named_modules()]).lower()
    if 'rel_pos' in names or 'relative_position' in names:
        return 'its attention has biases by relative position, which need the whole grid'
    library = type(model).__module__.partition('.')[0]
    if library in ('torchvision', 'transformers'):
        return f"it is a model of {library}, and evolution is for timm's"
    if 'attn' not in names and 'attention' not in names:
        return 'it has no attention, and so no tokens to select'
    return "its forward pass is not that of timm's VisionTransformer, Eva or Levit"
