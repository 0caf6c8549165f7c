""" The published selections, `'stage'` and `'layer'`: the steps of the paper in its order, and their selector

`Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390.

Symbolic tracing sees each step as one node (`torch.fx.wrap`), because the number of slow tokens depends on the shape of
the input, which tracing does not know.

Shapes: B images, P prefix tokens (class, distillation, registers), N patch tokens, K of them slow, L tokens present,
C channels, H heads of d channels. Sequences have timm's order: first the prefix, then the patches in grid order. After
a selection, the blocks of its segment get [prefix, slow tokens, representative token].
"""
import torch
import torch.fx
from torch import Tensor

from ..kernels.choice import can_run, is_differentiated, launch
from . import sequences
from .class_attention import class_products
from .schedule import Schedule
from .selector import Selector
from .sequences import count_slow, patches


@torch.fx.wrap
def class_attention(
        query: Tensor,
        key: Tensor,
        scale: float,
        num_prefix_tokens: int = 0,
        rotation: Tensor | None = None,
        rotate_half: bool = False,
) -> Tensor:
    """Attention that the class token pays to every token, summed over the heads.

    Paper: class attention, section "Structure preserving token selection". The arguments are those of `class_products`.

    Returns:
        Attention (B, L); every row sums to H. In float32 or wider, because in half precision small shares become equal.
    """
    products = class_products(query, key, scale, num_prefix_tokens, rotation, rotate_half)
    return products.softmax(dim=-1).sum(dim=1)


@torch.fx.wrap
def global_class_attention(
        scores: Tensor | None,
        attention: Tensor,
        tradeoff: float,
        learned: Tensor | None = None,
) -> Tensor:
    """Update the scores of the tokens in a block: A <- (1 - alpha) A + alpha a.

    Paper: global class attention, section "Structure preserving token selection". Prefix tokens also have scores, which
    nothing reads, so that tokens and scores have the same index.

    Args:
        scores: Scores of these tokens before the update (B, P + K); None for the first block.
        attention: Class attention of the tokens in the block, without a representative token (B, P + K).
        tradeoff: alpha, the share of the new attention.
        learned: Learned trade-off (1,); its sigmoid replaces `tradeoff`.

    Returns:
        Scores (B, P + K).
    """
    if scores is None:
        return attention
    if learned is None:
        return torch.lerp(scores, attention, tradeoff)
    return torch.lerp(scores, attention, learned.to(scores.dtype).sigmoid())


@torch.fx.wrap
def select_tokens(scores: Tensor, keep_ratio: float, num_prefix_tokens: int) -> Tensor:
    """Choose the informative tokens of each image, those with the highest scores.

    Paper: section "Structure preserving token selection".

    Args:
        scores: Global class attention (B, P + N).
        keep_ratio: Share of the patch tokens on the slow path.
        num_prefix_tokens: Number of prefix tokens P, which are always on the slow path.

    Returns:
        Positions in the sequence of the prefix tokens and K = int(keep_ratio * N) slow tokens (B, P + K).

    Raises:
        ValueError: No patch token would be on the slow path.
    """
    num_slow = count_slow(keep_ratio, scores.shape[1] - num_prefix_tokens)
    slow = patches(scores, num_prefix_tokens).topk(num_slow, dim=1, sorted=False)[1]  # their order has no meaning
    if num_prefix_tokens == 0:
        return slow
    slow = slow + num_prefix_tokens
    prefix = torch.arange(num_prefix_tokens, device=slow.device).expand(slow.shape[0], num_prefix_tokens)
    return torch.cat([prefix, slow], dim=1)


@torch.fx.wrap
def representative_token(x: Tensor, scores: Tensor, slow: Tensor) -> Tensor:
    """Average the placeholder tokens into one token, weighted by their scores.

    Paper: representative token, section "Slow-fast token updating".

    Args:
        x: Full sequence (B, P + N, C).
        scores: Global class attention (B, P + N).
        slow: Positions of prefix and slow tokens (B, P + K), which are not averaged.

    Returns:
        Representative token (B, 1, C).
    """
    weight = scores.scatter(1, slow, 0.)
    # about the smallest float32 at least, because the scores of all placeholders can underflow to zero
    weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1e-37)
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    return weight.unsqueeze(1).bmm(x)


@torch.fx.wrap
def follow(x: Tensor, tokens: Tensor, slow: Tensor, representative: Tensor | None) -> Tensor:
    """Restore the full sequence after some blocks of a segment.

    Paper: section "Slow-fast token updating". Each token follows one token: to its value at the beginning of the
    segment, the change of the followed token is added. Prefix and slow tokens follow themselves, so they are exactly
    the output of the blocks. Placeholders follow the representative token; without one they are unchanged.

    Args:
        x: Full sequence at the beginning of the segment (B, P + N, C).
        tokens: Output of the blocks: [prefix, slow tokens, representative token] (B, P + K + 1, C), or (B, P + K, C)
            without a representative token.
        slow: Positions of prefix and slow tokens (B, P + K).
        representative: Representative token that went into the blocks (B, 1, C), if any.

    Returns:
        Full sequence (B, P + N, C).
    """
    # added to all tokens: the slow ones are overwritten below, so the placeholders need no index
    moved = x.clone() if representative is None else x + (tokens[:, -1:] - representative)
    moved = moved.contiguous()  # it is not, if the patches are columns of a feature map
    image = torch.arange(slow.shape[0], device=slow.device).unsqueeze(1)
    return moved.index_put_((image, slow), tokens[:, :slow.shape[1]])


class ByClassAttention(Selector):
    """Selection of the tokens with the highest scores; the others follow the representative token."""

    def __init__(
            self,
            schedule: Schedule,
            num_prefix_tokens: int,
            fast_update: bool,
            scores: Tensor | None = None,
    ) -> None:
        """
        Args:
            schedule: Schedule of the blocks.
            num_prefix_tokens: Number of prefix tokens P.
            fast_update: Whether a representative token goes through the blocks for the placeholders.
            scores: Scores of all tokens before the first block (B, P + N), if any.
        """
        super().__init__(schedule, num_prefix_tokens)
        self.scores = scores  # of the tokens present without a representative one (B, P + K); None if nothing reads it
        self.fast_update = fast_update
        self._begun: tuple[Tensor, Tensor | None] | None = None
        self._representative: Tensor | None = None
        self._place: Tensor | None = None  # set by kernels: position of each token among those present (B, P + N)
        self._entered: Tensor | None = None  # set by kernels: input of the blocks

    def update_scores(self, block: int, attention: Tensor) -> None:
        """Update the scores with the class attention (B, L) of a block for all tokens that are present."""
        if self._representative is not None:
            attention = attention[:, :-1]
        self.scores = global_class_attention(self.scores, attention, self.schedule.tradeoff[block])

    def whole(self, x: Tensor) -> Tensor:
        if self._begun is None or self.present is None:
            return x
        if self._place is None or is_differentiated(x):  # kernels may have selected before a block that is trained
            return follow(self._begun[0], x, self.present, self._representative)
        return launch('follow', self._begun[0], x, self._place, self._entered, self.present.shape[1])

    def whole_scores(self) -> Tensor | None:
        """Scores of all tokens (B, P + N)."""
        if self._begun is None or self.present is None:
            return self.scores
        scores = self._begun[1]
        return scores if scores is None or self.scores is None else scores.scatter(1, self.present, self.scores)

    def _select(self, block: int, x: Tensor) -> Tensor:
        x, scores = self.whole(x), self.whole_scores()
        self._begun = x, scores
        keep_ratio = self.schedule.keep_ratio[block]
        if keep_ratio == 1:
            self.present, self._representative, self.scores = None, None, scores
            return x
        assert scores is not None
        if can_run(x) and can_run(scores):
            return self._select_by_kernels(block, x, scores)
        self._place = None
        self.present = select_tokens(scores, keep_ratio, self.num_prefix_tokens)
        self.scores = scores.gather(1, self.present) if self.needs_attention(block) else None
        if self.record is not None:
            self.record.note_selected(block, self.present, scores, self.fast_update)
        tokens = sequences.gather_tokens(x, self.present)
        if not self.fast_update:
            return tokens
        self._representative = representative_token(x, scores, self.present)
        return torch.cat([tokens, self._representative], dim=1)

    def _select_by_kernels(self, block: int, x: Tensor, scores: Tensor) -> Tensor:
        """Select as `_select`, with kernels."""
        num_slow = count_slow(self.schedule.keep_ratio[block], x.shape[1] - self.num_prefix_tokens)
        present, self._place, weight, present_scores = launch(
            'select_tokens', scores, num_slow, self.num_prefix_tokens)
        self.present = present
        self.scores = present_scores if self.needs_attention(block) else None
        if self.record is not None:
            self.record.note_selected(block, present, scores, self.fast_update)
        tokens = launch('gather_with_representative', x, present, weight, self.fast_update)
        self._entered = tokens
        if self.fast_update:
            self._representative = tokens[:, -1:]
        return tokens

    def _has_representative(self) -> bool:
        return self._representative is not None
