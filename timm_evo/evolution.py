""" Token evolution on tensors

The steps of `Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer` - https://arxiv.org/abs/2108.01390,
one function each. Nothing here knows a model: a model runs its own blocks between `begin_segment` and
`slow_fast_update`, and evolves the scores with `global_class_attention` beside them.

Each step is one node to symbolic tracing (`torch.fx.wrap`): how many tokens are slow follows from the shape of the
input, which tracing does not know. Batches are reshaped by `view`, because `unflatten` would fix their size in a traced
ONNX graph.

Shapes: B images, P prefix tokens (class, distillation, registers), N patch tokens, K of them slow, C channels, H heads
of d channels. Sequences are laid out as timm's: prefix first, then the patches in grid order. While a selection is
open, the blocks see [prefix, slow tokens, representative token].
"""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor


@torch.fx.wrap
def project_query_key(
        query_tokens: Tensor,
        tokens: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        num_heads: int,
) -> tuple[Tensor, Tensor]:
    """Queries of some tokens and keys of all, as the attention module of a timm block computes them.

    Args:
        query_tokens: Normalised tokens to take queries of (B, T, C).
        tokens: Normalised tokens to take keys of (B, L, C).
        qkv_weight: Stacked query, key and value projections (3 * H * d, C).
        qkv_bias: Their bias (3 * H * d,), if any.
        num_heads: Number of heads H.

    Returns:
        Queries (B, H, T, d) and keys (B, H, L, d).
    """
    query_weight, key_weight, _ = qkv_weight.chunk(3)
    query_bias = None if qkv_bias is None else qkv_bias.chunk(3)[0]
    key_bias = None if qkv_bias is None else qkv_bias.chunk(3)[1]
    query = F.linear(query_tokens, query_weight, query_bias)
    key = F.linear(tokens, key_weight, key_bias)
    return _split_heads(query, num_heads), _split_heads(key, num_heads)


@torch.fx.wrap
def split_query_key(query_qkv: Tensor, qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Queries of some tokens and keys of all, where the attention module has projected the tokens itself.

    Args:
        query_qkv: Queries, keys and values of the tokens to take queries of, side by side (B, T, 3 * H * d).
        qkv: The same of all tokens (B, L, 3 * H * d).
        num_heads: Number of heads H.

    Returns:
        Queries (B, H, T, d) and keys (B, H, L, d).
    """
    return _split_heads(query_qkv.chunk(3, dim=2)[0], num_heads), _split_heads(qkv.chunk(3, dim=2)[1], num_heads)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, H * d) to (B, H, L, d)."""
    return x.view(x.shape[0], x.shape[1], num_heads, x.shape[2] // num_heads).transpose(1, 2)


def _softmax(logits: Tensor, scale: float) -> Tensor:
    """Attention of scaled logits; half precision is raised to float32, because its small shares would tie in ranks."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    return (logits * scale).softmax(dim=-1)


@torch.fx.wrap
def class_attention(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention that the class token pays to every token, summed over the heads.

    Paper: class attention, section "Structure preserving token selection".

    Args:
        query: Query of the class token, one per head (B, H, d).
        keys: Keys of all tokens present (B, H, L, d).
        scale: Factor on the products, 1 / sqrt(d) of the attention.

    Returns:
        Attention (B, L) in float32 or wider; every row sums to H.
    """
    logits = (query.unsqueeze(2) @ keys.transpose(2, 3)).squeeze(2)
    return _softmax(logits, scale).sum(dim=1)


@torch.fx.wrap
def folded_attention(
        query_tokens: Tensor,
        tokens: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        num_heads: int,
        scale: float,
) -> Tensor:
    """Attention that a few tokens pay to all, without computing a single key.

    The key projection can be applied to the few queries instead of to every token:
    q . (W_k x + b_k) = (W_k^T q) . x + q . b_k, and the last term, equal for all tokens, drops out of the softmax. This
    takes H * T * L * C multiplications instead of L * C * C, and leaves the attention module of the block untouched.

    Args:
        query_tokens: Normalised tokens that look at the others (B, T, C).
        tokens: Normalised tokens present (B, L, C).
        qkv_weight: Stacked query, key and value projections (3 * H * d, C).
        qkv_bias: Their bias (3 * H * d,), if any.
        num_heads: Number of heads H.
        scale: Factor on the products.

    Returns:
        Attention (B, H, T, L) in float32 or wider; every row sums to 1.
    """
    batch_size, num_queries = query_tokens.shape[:2]
    head_dim = qkv_weight.shape[0] // (3 * num_heads)
    query_weight, key_weight, _ = qkv_weight.chunk(3)
    query_bias = None if qkv_bias is None else qkv_bias.chunk(3)[0]
    query = F.linear(query_tokens.flatten(0, 1), query_weight, query_bias)
    query = query.view(batch_size * num_queries, num_heads, head_dim)
    query = query.transpose(0, 1).bmm(key_weight.unflatten(0, (num_heads, head_dim)))  # (H, B * T, C)
    query = query.view(num_heads, batch_size, num_queries, tokens.shape[2])
    query = query.transpose(0, 1).flatten(1, 2)  # (B, H * T, C)
    attention = _softmax(query.bmm(tokens.transpose(1, 2)), scale)
    return attention.view(batch_size, num_heads, num_queries, tokens.shape[1])


@torch.fx.wrap
def select_query_tokens(tokens: Tensor, class_token: bool, num_prefix_tokens: int, slow: Tensor | None) -> Tensor:
    """Tokens that look at the others: the class token (B, 1, C), or without one the patch tokens present (B, T, C).

    Args:
        tokens: Tokens present (B, L, C).
        class_token: Whether the first token is the class token.
        num_prefix_tokens: Number of prefix tokens P.
        slow: Positions of prefix and slow tokens (B, P + K); None where no selection is open.
    """
    if class_token:
        return tokens[:, :1]
    return tokens[:, num_prefix_tokens:tokens.shape[1] if slow is None else slow.shape[1]]


@torch.fx.wrap
def folded_class_attention(
        tokens: Tensor,
        class_token: bool,
        num_prefix_tokens: int,
        slow: Tensor | None,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        num_heads: int,
        scale: float,
) -> Tensor:
    """Class attention by `folded_attention`, of the class token or of the mean query of the patch tokens.

    Args:
        tokens: Normalised tokens present (B, L, C).
        class_token: Whether the first token is the class token.
        num_prefix_tokens: Number of prefix tokens P.
        slow: Positions of prefix and slow tokens (B, P + K); None where no selection is open.
        qkv_weight: Stacked query, key and value projections (3 * H * d, C).
        qkv_bias: Their bias (3 * H * d,), if any.
        num_heads: Number of heads H.
        scale: Factor on the products.

    Returns:
        Attention (B, L), as `class_attention` gives it.
    """
    querying = select_query_tokens(tokens, class_token, num_prefix_tokens, slow)
    if not class_token:
        querying = querying.mean(dim=1, keepdim=True)
    return folded_attention(querying, tokens, qkv_weight, qkv_bias, num_heads, scale).squeeze(2).sum(dim=1)


@torch.fx.wrap
def folded_values(attention: Tensor, tokens: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None) -> Tensor:
    """What a few tokens gather by attention, without computing a single value.

    As in `folded_attention`, the projection is applied to the few results: sum_j a_j (W_v x_j + b_v) is
    W_v (sum_j a_j x_j) + b_v sum_j a_j, where the last sum is 1 unless attention was dropped.

    Args:
        attention: Attention of few tokens to all (B, H, T, L).
        tokens: Normalised tokens present (B, L, C).
        qkv_weight: Stacked query, key and value projections (3 * H * d, C).
        qkv_bias: Their bias (3 * H * d,), if any.

    Returns:
        Values of all heads side by side (B, T, H * d), as they enter the output projection.
    """
    batch_size, num_heads, num_queries, _ = attention.shape
    gathered = attention.flatten(1, 2).to(tokens.dtype).bmm(tokens)
    gathered = gathered.view(batch_size, num_heads, num_queries, tokens.shape[2])
    weight = qkv_weight.chunk(3)[2].unflatten(0, (num_heads, -1))  # (H, d, C)
    values = torch.einsum('bhtc,hdc->bthd', gathered, weight)
    if qkv_bias is not None:
        bias = qkv_bias.chunk(3)[2].unflatten(0, (num_heads, -1))
        values = values + attention.sum(dim=3).transpose(1, 2).unsqueeze(3).to(values.dtype) * bias
    return values.flatten(2)


@torch.fx.wrap
def mean_attention(attention: Tensor, class_token: bool, slow: Tensor | None) -> Tensor:
    """Class attention from an attention matrix at hand, averaged over the heads.

    Without a class token, the average of the patch tokens takes its place, as the head that averages them reads it.
    Half precision is raised to float32, as in `class_attention`.

    Args:
        attention: Attention of all tokens present (H, B, T, L), or of those that are left by downsampling.
        class_token: Whether the first token is the class token.
        slow: Positions of prefix and slow tokens (B, P + K); None where no selection is open.

    Returns:
        Attention (B, L).
    """
    num_queries = 1 if class_token else attention.shape[2] if slow is None else slow.shape[1]
    dtype = torch.float64 if attention.dtype == torch.float64 else torch.float32
    # one dimension at a time: both at once take eight times as long on a CPU
    return attention[:, :, :num_queries].mean(dim=2, dtype=dtype).mean(dim=0)


def _mix(scores: Tensor, attention: Tensor, tradeoff: float, learned: Tensor | None) -> Tensor:
    if learned is None:
        return torch.lerp(scores, attention, tradeoff)
    return torch.lerp(scores, attention, learned.to(scores.dtype).sigmoid())


@torch.fx.wrap
def global_class_attention(
        scores: Tensor | None,
        attention: Tensor,
        tradeoff: float,
        slow: Tensor | None,
        learned: Tensor | None = None,
) -> Tensor:
    """Evolve the scores by one block: A <- (1 - alpha) A + alpha a for the tokens that went through it.

    Paper: global class attention, section "Structure preserving token selection". Prefix tokens have scores, too, which
    nothing reads; so one index serves tokens and scores.

    Args:
        scores: Scores so far (B, P + N); None before the first block, which sets them.
        attention: Class attention of the tokens that went through the block (B, P + N), or (B, P + K) and more where a
            selection is open.
        tradeoff: alpha, the share of the new attention.
        slow: Positions of prefix and slow tokens (B, P + K); None where no selection is open.
        learned: Learned trade-off (1,), whose sigmoid takes the place of `tradeoff`.

    Returns:
        Scores (B, P + N).
    """
    if scores is None:
        return attention
    if slow is None:
        return _mix(scores, attention, tradeoff, learned)
    attention = attention[:, :slow.shape[1]]  # without the representative token
    return scores.scatter(1, slow, _mix(scores.gather(1, slow), attention, tradeoff, learned))


@torch.fx.wrap
def downsampled_class_attention(scores: Tensor, scores_left: Tensor, num_prefix_tokens: int) -> Tensor:
    """Scores of the tokens that are left where an attention downsamples the grid.

    As in the authors' LeViT, the patch tokens that are left share the sum that all had, so the new attention keeps its
    weight against the old.

    Args:
        scores: Scores before that attention (B, P + N).
        scores_left: Scores evolved by that attention, of the tokens that are left (B, P + M).
        num_prefix_tokens: Number of prefix tokens P.

    Returns:
        Scores (B, P + M).
    """
    sums = [a[:, num_prefix_tokens:].sum(dim=1, keepdim=True) for a in (scores, scores_left)]
    return scores_left * (sums[0] / sums[1])


@torch.fx.wrap
def select_tokens(scores: Tensor, keep_ratio: float, num_prefix_tokens: int) -> Tensor:
    """Choose the informative tokens of each image, those with the highest scores.

    Paper: section "Structure preserving token selection".

    Args:
        scores: Global class attention (B, P + N).
        keep_ratio: Share of the patch tokens on the slow path.
        num_prefix_tokens: Number of prefix tokens P, which are always on it.

    Returns:
        Positions in the sequence of the prefix tokens and K = int(keep_ratio * N) slow tokens (B, P + K).

    Raises:
        ValueError: No patch token would be left on the slow path.
    """
    num_patches = scores.shape[1] - num_prefix_tokens
    num_slow = int(keep_ratio * num_patches)
    if num_slow < 1:
        raise ValueError(
            f'keep_ratio={keep_ratio} of {num_patches} patch tokens leaves none on the slow path, '
            'use a larger keep_ratio or a larger image.')
    slow = scores[:, num_prefix_tokens:].topk(num_slow, dim=1, sorted=False)[1]  # their order has no meaning
    if num_prefix_tokens == 0:
        return slow
    slow = slow + num_prefix_tokens
    prefix = torch.arange(num_prefix_tokens, device=slow.device).expand(slow.shape[0], num_prefix_tokens)
    return torch.cat([prefix, slow], dim=1)


@torch.fx.wrap
def representative_token(x: Tensor, scores: Tensor, slow: Tensor) -> Tensor:
    """Summarise the placeholder tokens in one, weighted by their share of the scores.

    Paper: representative token, section "Slow-fast token updating".

    Args:
        x: Full sequence (B, P + N, C).
        scores: Global class attention (B, P + N).
        slow: Positions of prefix and slow tokens (B, P + K), which take no part.

    Returns:
        Representative token (B, 1, C).
    """
    weight = scores.scatter(1, slow, 0.)
    # a floor of about the smallest float32, because the scores of all placeholders can underflow to zero together
    weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1e-37)
    return weight.unsqueeze(1).to(x.dtype).bmm(x)


def _rows(positions: Tensor, num_tokens: int) -> Tensor:
    """Positions (B, K) in sequences of a length as rows of the whole batch (B * K,), to copy whole rows at once."""
    offsets = torch.arange(positions.shape[0], device=positions.device).unsqueeze(1) * num_tokens
    return (positions + offsets).flatten()


@torch.fx.wrap
def begin_segment(
        x: Tensor,
        scores: Tensor | None,
        keep_ratio: float,
        num_prefix_tokens: int,
        fast_update: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Select tokens for the blocks of a segment.

    Args:
        x: Full sequence (B, P + N, C).
        scores: Global class attention (B, P + N).
        keep_ratio: Share of the patch tokens on the slow path; 1 selects nothing.
        num_prefix_tokens: Number of prefix tokens P.
        fast_update: Whether a representative token goes through the blocks for the placeholders.

    Returns:
        What goes through the blocks: [prefix, slow tokens, representative token] (B, P + K + 1, C), without the last if
            not `fast_update`, or the full sequence.
        Positions of prefix and slow tokens (B, P + K), or None.
        Representative token (B, 1, C), or None.
    """
    if keep_ratio == 1:
        return x, None, None
    assert scores is not None
    slow = select_tokens(scores, keep_ratio, num_prefix_tokens)
    tokens = x.flatten(0, 1).index_select(0, _rows(slow, x.shape[1]))
    tokens = tokens.view(slow.shape[0], slow.shape[1], x.shape[2])
    if not fast_update:
        return tokens, slow, None
    representative = representative_token(x, scores, slow)
    return torch.cat([tokens, representative], dim=1), slow, representative


@torch.fx.wrap
def slow_fast_update(x: Tensor, tokens: Tensor, slow: Tensor | None, representative: Tensor | None) -> Tensor:
    """Give the full sequence back after some blocks of a segment.

    Paper: section "Slow-fast token updating". Prefix and slow tokens return to their places; every placeholder is moved
    by what the blocks added to the representative token, or stays as it was without one.

    Args:
        x: Full sequence at the beginning of the segment (B, P + N, C).
        tokens: What came out of the blocks, laid out as by `begin_segment`.
        slow: Positions of prefix and slow tokens (B, P + K); None where `tokens` is the full sequence.
        representative: Representative token that went into the blocks (B, 1, C), if any.

    Returns:
        Full sequence (B, P + N, C).
    """
    if slow is None:
        return tokens
    rows = _rows(slow, x.shape[1])
    if representative is None:
        return x.flatten(0, 1).index_copy(0, rows, tokens.flatten(0, 1)).view_as(x)
    # added to all, because the copy overwrites the others: the placeholders need no index of their own
    moved = x + (tokens[:, -1:] - representative)
    return moved.flatten(0, 1).index_copy_(0, rows, tokens[:, :-1].flatten(0, 1)).view_as(x)


@torch.fx.wrap
def bias_positions(index: Tensor, slow: Tensor | None, representative: Tensor | None, num_biases: int) -> Tensor | None:
    """Where the slow tokens find their attention biases in a table by relative position.

    Args:
        index: Entry of the table for each query and key of the whole grid (N, N).
        slow: Positions of the slow tokens (B, K); there are no prefix tokens where there are biases.
        representative: Representative token, if any. It has no position: it reads the entry after the last.
        num_biases: Number of entries of the table.

    Returns:
        Entry for each query and key (B, K, K), or (B, K + 1, K + 1) with a representative token; None if `slow` is.
    """
    if slow is None:
        return None
    if representative is not None:  # stands after the last token of the grid
        slow = F.pad(slow, (0, 1), value=float(index.shape[0]))
        index = F.pad(index, (0, 1, 0, 1), value=float(num_biases))
    return index.flatten()[slow.unsqueeze(2) * index.shape[0] + slow.unsqueeze(1)]


@torch.fx.wrap
def gather_biases(biases: Tensor, positions: Tensor) -> Tensor:
    """Attention biases of the tokens of a selection.

    Args:
        biases: Table (H, N).
        positions: Entries (B, L, L), as `bias_positions` gives them.

    Returns:
        Biases (H, B, L, L), zero for the representative token.
    """
    gathered = F.pad(biases, (0, 1)).index_select(1, positions.flatten())
    return gathered.view(biases.shape[0], positions.shape[0], positions.shape[1], positions.shape[2])
