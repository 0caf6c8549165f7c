""" Class attention from a block's own call

Every attention of timm calls `q, k = self.q_norm(q), self.k_norm(k)`, with identities if there is no norm. A tap
changes the class of these two modules, so their parameters keep their names. It gets the queries and keys with which
the block attends, also with adapters, quantized weights, hooks and shards.

Threads may run one model at the same time, so queries and keys belong to one call of a block, a `Listener`. Each thread
has its own listener of the block that it runs. Compiled code cannot distinguish threads, and takes the listener from
the tap. If a whole model is compiled to one graph, this is plain data flow. Compiled blocks run one at a time.
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
    """The access to the queries and keys of a block.

    Attributes:
        listener: The listener for compiled code; None while the block does not run.
    """

    def __init__(self) -> None:
        self.listener: Listener | None = None

    def __getstate__(self) -> dict:
        return dict(listener=None)  # a copy that is made while the block runs does not belong to the call

    @classmethod
    def place(cls, block: nn.Module) -> 'Tap':
        """Change the class of the modules `q_norm` and `k_norm`, or return an existing tap.

        Args:
            block: A block that `check_block` allows. Shallow copies of a model share their blocks and the taps in them.
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
        """Give the modules their original class again."""
        for module in block.modules():
            # not if other code has derived a class from the tapped one, because that class would be lost
            if isinstance(module, Tapped) and 'norm_cls' in vars(parametrize.type_before_parametrizations(module)):
                norm_cls = module.norm_cls
                change_class(module, lambda tapped_cls, norm_cls=norm_cls: norm_cls)
                del module.tap, module.attention


class Listener:
    """Takes the class attention of one call of a block.

    Args:
        tap: Tap of the block.
        layout: Kinds of the tokens in this call.
        rotation: Rotations in this call, if any.
    """

    def __init__(self, tap: Tap, layout: Layout, rotation: Tensor | None) -> None:
        self.tap = tap
        self.layout = layout
        self.rotation = rotation
        self._with_gradient = torch.is_grad_enabled()
        self._query: Tensor | None = None  # query of the class token in the attention whose keys come next
        self._postponed: list[tuple[Tensor, Tensor, Any]] = []
        self._attention: Tensor | None = None

    def on_query(self, query: Tensor, attn: Any) -> None:
        """Take normalised queries of an attention: (B, H, L, d), or (B, L, H, d) in a block of parallel branches."""
        query = _by_heads(query, attn)
        self._query = class_attention.class_query(query, self.layout, self.rotation, _rotates_half(attn))

    def on_key(self, key: Tensor, attn: Any) -> None:
        """Take normalised keys of an attention: (B, H, L, d), or (B, L, H, d) in a block of parallel branches."""
        if self._query is None or self._with_gradient != torch.is_grad_enabled():
            return  # a wrapper may have turned gradients off, to recompute the block later without a listener
        if self._with_gradient and not torch.jit.is_tracing():
            # A wrapper may recompute the block without a listener. The recomputation must save the same tensors for the
            # gradient, so only views are made here, for which none are saved. Traces are not recomputed. They are
            # checked by a trace without gradients, which must have the same order of operations.
            self._postponed.append((self._query, key, attn))
        else:
            self._add(self._query, key, attn)  # now, because the keys would stay in memory while the MLP runs
        self._query = None  # a view, which would keep all projections in memory

    def class_attention(self) -> Tensor | None:
        """Class attention (B, L), summed over the heads of all attentions in the block; None if there were none."""
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
    """The state of a thread.

    Attributes:
        listener: Listener of the block that the thread runs.
        is_in_model: Whether the thread is in the forward pass of an evolved model.
    """
    listener: Listener | None = None
    is_in_model = False


_thread = _Thread()
_turn = threading.RLock()  # for one compiled block at a time; a hook in the block may call another model


def call_and_score(
        block: nn.Module,
        x: Tensor,
        tap: Tap,
        layout: Layout,
        rotation: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Call a block and take its class attention.

    Args:
        block: A block with a tap. It may be wrapped or compiled.
        x: Tokens present (B, L, C).
        tap: Tap of the block.
        layout: Kinds of these tokens.
        rotation: Rotations of these tokens without the prefix, for a block that takes them.

    Returns:
        Output of the block (B, L, C).
        Class attention (B, L), see `method.published.class_attention`; None if the tap got no queries and keys.
    """
    listener = Listener(tap, layout, rotation)
    arguments = {} if rotation is None else {'rope': rotation}
    if torch.compiler.is_dynamo_compiling():  # `is_compiling` would be true while any thread compiles
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
    """A context for the blocks of an evolved model, by which calls of blocks outside of it are found."""

    def __enter__(self) -> None:
        self.before = _thread.is_in_model
        _thread.is_in_model = True

    def __exit__(self, *exception) -> None:
        _thread.is_in_model = self.before


def _warn_if_alone(attn: Any, caller: FrameType) -> None:
    """Warn if other code than the model calls a block, which then computes as in the dense model.

    Args:
        attn: The attention whose query norm was called.
        caller: Frame of the caller. In a graph that was traced from a whole model, it is not the attention.
    """
    is_recomputed = is_in_backward()  # a checkpoint runs the block again
    if caller.f_locals.get('self') is attn and not is_recomputed and not _is_compiled_in_part(caller):
        _warn_of_own_loop()


def _is_compiled_in_part(frame: FrameType | None) -> bool:
    """Whether the caller is a model after a break of its compiled graph, which does not enter `in_model`."""
    while frame is not None:
        if frame.f_globals.get('__name__') == f'{__package__}.flat':
            return True
        frame = frame.f_back
    return False


@functools.cache  # once in a process
def _warn_of_own_loop() -> None:
    warnings.warn(
        'A block of an evolved model was called outside of the forward pass of the model, so it computes what the '
        'dense model computes, for all tokens. Call the model, or its forward_features or forward_intermediates. '
        'timm_evo.restore makes the model dense.',
        stacklevel=5,
    )


@contextmanager
def _listening(listener: Listener) -> Iterator[None]:
    """A context in which a listener is that of this thread and of compiled code."""
    before = _thread.listener
    _thread.listener = listener.tap.listener = listener
    try:
        yield
    finally:
        _thread.listener, listener.tap.listener = before, None


def _holds_compiled(module: nn.Module) -> bool:
    """Whether compiled code may run in a call of the module. A replaced `forward` may be compiled."""
    if is_compiled(module) or 'forward' in module.__dict__:
        return True
    return any(_holds_compiled(child) for child in children(module))


class Tapped(nn.Module):
    """First base of a norm, or of the identity in its place, that passes the output to a listener.

    The output is unchanged.
    """
    if TYPE_CHECKING:
        tap: Tap
        # A weak reference, because the attention refers to its norms, and Python frees cycles late. The attention no
        # longer exists if a user has moved the norm into another attention, about which nothing is known.
        attention: weakref.ref[Any]
        norm_cls: type[nn.Module]

    def __getstate__(self) -> dict:
        return self.__dict__ | dict(attention=self.attention())  # the attention is copied with its norms

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
        return self.norm_cls.__name__  # for `repr`, as in the dense model


class _TappedQuery(Tapped):

    def __call__(self, x: Tensor) -> Tensor:
        x = super().__call__(x)
        listener, attn = self._listener(), self.attention()
        if attn is None:
            return x
        if listener is not None:
            listener.on_query(x, attn)
        elif not torch.compiler.is_dynamo_compiling() and not _thread.is_in_model:
            _warn_if_alone(attn, sys._getframe(1))
        return x


class _TappedKey(Tapped):

    def __call__(self, x: Tensor) -> Tensor:
        x = super().__call__(x)
        listener, attn = self._listener(), self.attention()
        if listener is not None and attn is not None:
            listener.on_key(x, attn)
        return x


@functools.cache
def _tapped_class(norm_cls: type[nn.Module], tapped_cls: type[Tapped]) -> type[Tapped]:
    return type(f'{tapped_cls.__name__}{norm_cls.__name__}', (tapped_cls, norm_cls), {
        '__module__': norm_cls.__module__,  # by which symbolic tracing decides which modules it traces into
        # copying and pickling cannot find the class by its name
        '__reduce__': lambda self: (_new, (norm_cls, tapped_cls), self.__getstate__()),
        'norm_cls': norm_cls,
    })


def _new(norm_cls: type[nn.Module], tapped_cls: type[Tapped]) -> Tapped:
    cls = _tapped_class(norm_cls, tapped_cls)
    return cls.__new__(cls)


def _by_heads(x: Tensor, attn: Any) -> Tensor:
    """Queries or keys of an attention as (B, H, L, d). A block of parallel branches has tokens before heads."""
    return x.transpose(1, 2) if isinstance(attn, ParallelScalingBlock) else x


def _rotates_half(attn: Any) -> bool:
    """Whether an attention rotates the two halves of the channels, and not pairs of neighbours."""
    return getattr(attn, 'rotate_half', False)


def _attentions(block: Any) -> list[Any]:
    """The modules of a block that have `q_norm`, `k_norm` and `scale`."""
    if isinstance(block, ParallelThingsBlock):
        return [part.attn for part in block.attns]
    return [block if isinstance(block, ParallelScalingBlock) else block.attn]


# timm's blocks, and their attentions that multiply the outputs of `q_norm` and `k_norm`
_KNOWN: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {
    Block: (Attention,),
    ResPostBlock: (Attention,),
    ParallelThingsBlock: (Attention,),
    ParallelScalingBlock: (ParallelScalingBlock,),
    EvaBlock: (EvaAttention, AttentionRope),
    EvaBlockPostNorm: (EvaAttention, AttentionRope),
}


def check_block(block: nn.Module) -> None:
    """Check that a tap can get the queries and keys of a block.

    Raises:
        TypeError: The block or its attention is not of a known class of timm.
    """
    attentions = _attentions(block) if isinstance(block, tuple(_KNOWN)) else [getattr(block, 'attn', None)]
    known = next((known for cls, known in _KNOWN.items() if isinstance(block, cls)), ())
    unknown = [attn for attn in attentions if not isinstance(attn, known)]
    if unknown:
        inner = f' with {type(unknown[0]).__name__}' if unknown[0] is not None else ''
        raise TypeError(
            f'{type(block).__name__}{inner} cannot be evolved, because class attention can be taken only from '
            "timm's Attention in a Block, ResPostBlock, ParallelThingsBlock or ParallelScalingBlock, and from "
            'EvaAttention and AttentionRope in an EvaBlock or EvaBlockPostNorm.')
