""" Class attention from a block's own call

Every attention of timm calls `q, k = self.q_norm(q), self.k_norm(k)`, with identities where there is no norm. A tap
stands in these two places: it changes the class of the modules there, so their parameters keep their names, and hears
the queries and keys that the block attends with, whatever made them: adapters, quantized weights, hooks, shards.

Threads may run one model at the same time, so what is heard belongs to one call of a block, a `Listener`. A thread
keeps the listener of the block that it runs to itself. Compiled code can't tell threads apart, and takes it from the
tap: where a whole model is compiled to one graph, that is plain data flow; blocks that are compiled take turns.
"""
import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Attention,
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..kernels.choice import can_run, is_differentiated, launch
from ..method import class_attention, published
from ..method.class_attention import Layout
from ..torch_private import children, is_compiled, is_in_backward
from .classes import change_class

__all__ = ['Tap', 'Tapped', 'call_and_score', 'check_block']


class Tap:
    """Where the queries and keys of a block can be heard.

    Attributes:
        listener: For compiled code: who hears; None while the block does not run.
    """

    def __init__(self) -> None:
        self.listener: Listener | None = None

    def __getstate__(self) -> dict:
        return dict(listener=None)  # a copy made while the block runs takes no part in the call, nor can its tensors

    @classmethod
    def place(cls, block: nn.Module) -> 'Tap':
        """Change the class of the modules in the places of `q_norm` and `k_norm`, or find a tap that is there already.

        Args:
            block: A block that `check_block` takes. Shallow copies of a model share their blocks, and so the taps.
        """
        attentions = _attentions(block)
        if isinstance(attentions[0].k_norm, Tapped):
            return attentions[0].k_norm.tap
        tap = cls()
        for attn in attentions:
            for norm, tapped_cls in ((attn.q_norm, _TappedQuery), (attn.k_norm, _TappedKey)):
                change_class(norm, lambda norm_cls, tapped_cls=tapped_cls: _tapped_class(norm_cls, tapped_cls))
                norm.tap, norm.attention = tap, weakref.ref(attn)
        return tap

    @staticmethod
    def remove(block: nn.Module) -> None:
        """Give the modules their own class again."""
        for module in block.modules():
            # not where somebody else has derived another class from the tapped one, which would be lost
            if isinstance(module, Tapped) and 'norm_cls' in vars(parametrize.type_before_parametrizations(module)):
                norm_cls = module.norm_cls
                change_class(module, lambda tapped_cls, norm_cls=norm_cls: norm_cls)
                del module.tap, module.attention


class Listener:
    """Takes the class attention of one call of a block.

    Args:
        tap: Where it hears.
        layout: What the tokens are that the block is called with.
        rotation: Rotations that it is called with, if any.
    """

    def __init__(self, tap: Tap, layout: Layout, rotation: Tensor | None) -> None:
        self.tap = tap
        self.layout = layout
        self.rotation = rotation
        self._with_gradient = torch.is_grad_enabled()
        self._query: Tensor | None = None  # of the attention whose keys come next
        self._postponed: list[tuple[Tensor, Tensor, Any]] = []
        self._attention: Tensor | None = None

    def hear_query(self, query: Tensor, attn: Any) -> None:
        """Take queries of an attention as they leave their norm: (B, H, L, d), or (B, L, H, d) of parallel branches."""
        query = _by_heads(query, attn)
        self._query = class_attention.class_query(query, self.layout, self.rotation, _rotates_half(attn))

    def hear_key(self, key: Tensor, attn: Any) -> None:
        """Take keys of an attention as they leave their norm: (B, H, L, d), or (B, L, H, d) of parallel branches."""
        if self._query is None or self._with_gradient != torch.is_grad_enabled():
            return  # a wrapper may have taken the gradient away, and recompute the block where nobody listens
        if self._with_gradient and not torch.jit.is_tracing():
            # Who recomputes the block without a listener, as a wrapper around it may, must find the same tensors saved
            # for its gradient: views save none. Nobody recomputes while the model is traced, and a trace is checked by
            # another one, without gradient, which must have the same order.
            self._postponed.append((self._query, key, attn))
        else:
            self._add(self._query, key, attn)  # at once, because the keys would stay in memory while the MLP runs
        self._query = None  # a view of all that was projected

    def class_attention(self) -> Tensor | None:
        """Class attention (B, L), summed over the heads of all attentions in the block; None if none could be heard."""
        for postponed in self._postponed:
            self._add(*postponed)
        return self._attention

    def _add(self, query: Tensor, key: Tensor, attn: Any) -> None:
        key = _by_heads(key, attn)
        scale, num_prefix_tokens, rotates_half = attn.scale, self.layout.num_prefix_tokens, _rotates_half(attn)
        if can_run(key) and not is_differentiated(query):
            attention = launch(
                'class_attention', query, key, scale, num_prefix_tokens, self.rotation, rotates_half)
        else:
            attention = published.class_attention(
                query, key, scale, num_prefix_tokens, self.rotation, rotates_half)
        self._attention = attention if self._attention is None else self._attention + attention


class _Thread(threading.local):
    """What a thread runs.

    Attributes:
        listener: Who hears the block.
        is_in_model: Whether it is in the forward pass of an evolved model.
    """
    listener: Listener | None = None
    is_in_model = False


_thread = _Thread()
_turn = threading.RLock()  # of the threads that run a compiled block, from which a hook may call another model


def call_and_score(
        block: nn.Module,
        x: Tensor,
        tap: Tap,
        layout: Layout,
        rotation: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Call a block and take its class attention.

    Args:
        block: A block that `tap` stands in, wrapped or compiled or not.
        x: Tokens present (B, L, C).
        tap: Its tap.
        layout: What these tokens are.
        rotation: Rotations of the tokens present but the prefix, for a block that takes them.

    Returns:
        What the block returns (B, L, C).
        Class attention (B, L), see `method.published.class_attention`; None if none could be heard.
    """
    listener = Listener(tap, layout, rotation)
    arguments = {} if rotation is None else {'rope': rotation}
    if torch.compiler.is_dynamo_compiling():  # of this code; `is_compiling` is true while any thread compiles
        tap.listener = listener
        x = block(x, **arguments)
        tap.listener = None
    elif threading.active_count() > 1 and _holds_compiled(block):
        with _turn, _listening(listener):
            x = block(x, **arguments)
    else:
        with _listening(listener):
            x = block(x, **arguments)
    return x, listener.class_attention()


class in_model:
    """A `with` around the blocks of an evolved model, so that blocks that run outside are known."""

    def __enter__(self) -> None:
        self.before = _thread.is_in_model
        _thread.is_in_model = True

    def __exit__(self, *exception) -> None:
        _thread.is_in_model = self.before


def _warn_if_alone(attn: Any, caller: FrameType) -> None:
    """Warn of a block that somebody calls in a loop of his own, which is as in the dense model then.

    Args:
        attn: The attention whose query norm was called.
        caller: Who has called it. A graph that was traced from a whole model calls the norms of its attentions itself.
    """
    is_recomputed = is_in_backward()  # by a checkpoint
    if caller.f_locals.get('self') is attn and not is_recomputed and not _is_compiled_in_part(caller):
        _warn_of_own_loop()


def _is_compiled_in_part(frame: FrameType | None) -> bool:
    """Whether it is called by a model after a break of its compiled graph, which has not passed `in_model`."""
    while frame is not None:
        if frame.f_globals.get('__name__') == f'{__package__}.flat':
            return True
        frame = frame.f_back
    return False


@functools.cache  # once in a process
def _warn_of_own_loop() -> None:
    warnings.warn(
        'A block of an evolved model was called outside of the forward pass of the model: so it computes what the '
        "dense model does, for all tokens. Call the model, or its forward_features or forward_intermediates. "
        'timm_evo.restore makes the model dense.',
        stacklevel=5,
    )


@contextmanager
def _listening(listener: Listener) -> Iterator[None]:
    """Listen on this thread, and in compiled blocks."""
    before = _thread.listener
    _thread.listener = listener.tap.listener = listener
    try:
        yield
    finally:
        _thread.listener, listener.tap.listener = before, None


def _holds_compiled(module: nn.Module) -> bool:
    """Whether compiled code may run within a call of the module; an own `forward` may be compiled."""
    if is_compiled(module) or 'forward' in module.__dict__:
        return True
    return any(_holds_compiled(child) for child in children(module))


class Tapped(nn.Module):
    """To stand before the class of a norm, or of the identity in its place: what leaves it is heard.

    What the norm computes is left alone.
    """
    if TYPE_CHECKING:
        tap: Tap
        # A weak reference, because the attention refers to its norms, and cycles stay in memory until Python looks for
        # them. Its attention is gone where a norm has been put into another one, of which nothing is known.
        attention: weakref.ref[Any]
        norm_cls: type[nn.Module]

    def __getstate__(self) -> dict:
        return self.__dict__ | dict(attention=self.attention())  # copied with its norms

    def __setstate__(self, state: dict) -> None:
        attention = state['attention']
        attention_ref = (lambda: None) if attention is None else weakref.ref(attention)
        super().__setstate__(state | dict(attention=attention_ref))

    def _listener(self) -> Listener | None:
        if torch.compiler.is_dynamo_compiling():
            return self.tap.listener
        listener = _thread.listener
        return listener if listener is not None and listener.tap is self.tap else None

    def _get_name(self) -> str:
        return self.norm_cls.__name__  # in representations, as in the dense model


class _TappedQuery(Tapped):

    def __call__(self, x: Tensor) -> Tensor:
        x = super().__call__(x)
        listener, attn = self._listener(), self.attention()
        if attn is None:
            return x
        if listener is not None:
            listener.hear_query(x, attn)
        elif not torch.compiler.is_dynamo_compiling() and not _thread.is_in_model:
            _warn_if_alone(attn, sys._getframe(1))
        return x


class _TappedKey(Tapped):

    def __call__(self, x: Tensor) -> Tensor:
        x = super().__call__(x)
        listener, attn = self._listener(), self.attention()
        if listener is not None and attn is not None:
            listener.hear_key(x, attn)
        return x


@functools.cache
def _tapped_class(norm_cls: type[nn.Module], tapped_cls: type[Tapped]) -> type[Tapped]:
    return type(f'{tapped_cls.__name__}{norm_cls.__name__}', (tapped_cls, norm_cls), {
        '__module__': norm_cls.__module__,  # which tells symbolic tracing what to look into
        # a file can't find the class by its name
        '__reduce__': lambda self: (_new, (norm_cls, tapped_cls), self.__getstate__()),
        'norm_cls': norm_cls,
    })


def _new(norm_cls: type[nn.Module], tapped_cls: type[Tapped]) -> Tapped:
    cls = _tapped_class(norm_cls, tapped_cls)
    return cls.__new__(cls)


def _by_heads(x: Tensor, attn: Any) -> Tensor:
    """Queries or keys of an attention as (B, H, L, d); a block of parallel branches has tokens before heads."""
    return x.transpose(1, 2) if isinstance(attn, ParallelScalingBlock) else x


def _rotates_half(attn: Any) -> bool:
    """Whether an attention rotates the two halves of the channels, and not pairs of neighbours."""
    return getattr(attn, 'rotate_half', False)


def _attentions(block: Any) -> list[Any]:
    """The modules of a block that have `q_norm`, `k_norm` and `scale`."""
    if isinstance(block, ParallelThingsBlock):
        return [part.attn for part in block.attns]
    return [block if isinstance(block, ParallelScalingBlock) else block.attn]


# timm's blocks and the attentions in them that are known to attend by products of what `q_norm` and `k_norm` return
_KNOWN: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    Block: (Attention,),
    ResPostBlock: (Attention,),
    ParallelThingsBlock: (Attention,),
    ParallelScalingBlock: (ParallelScalingBlock,),
    EvaBlock: (EvaAttention, AttentionRope),
    EvaBlockPostNorm: (EvaAttention, AttentionRope),
}


def check_block(block: nn.Module) -> None:
    """Refuse a block whose attention is not known.

    Raises:
        TypeError: It is none of timm's with `Attention`; what they attend with is known.
    """
    attentions = _attentions(block) if isinstance(block, tuple(_KNOWN)) else [getattr(block, 'attn', None)]
    known = next((known for cls, known in _KNOWN.items() if isinstance(block, cls)), ())
    unknown = [attn for attn in attentions if not isinstance(attn, known)]
    if unknown:
        inner = f' with {type(unknown[0]).__name__}' if unknown[0] is not None else ''
        raise TypeError(
            f'{type(block).__name__}{inner} cannot be evolved: class attention can be taken only from '
            "timm's Attention in a Block, ResPostBlock, ParallelThingsBlock or ParallelScalingBlock, and from "
            'EvaAttention and AttentionRope in an EvaBlock or EvaBlockPostNorm.')
