"""A second implementation of token evolution in LeViT that is easy to check: one image at a time, with lists of tokens.

Only timm's projections, MLPs and norms see the whole batch at once, because batch norm has to.
"""
import torch
from torch import Tensor


def evolve_slowly(
        model,
        images: Tensor,
        keep_ratios: dict[tuple[int, int], float],
        tradeoff: list[float],
        fast_update: bool = True,
        selected: list | None = None,
) -> list[Tensor]:
    """Run the stages of a LeViT with token evolution.

    Args:
        model: The LeViT whose modules are used.
        images: Images (B, C, H, W).
        keep_ratios: Share of slow tokens by stage and block that begins a segment.
        tradeoff: alpha of each attention.
        fast_update: Whether placeholders follow the representative token.
        selected: Gets stage and block, and slow patches and scores of all patches of each image, of each selection.

    Returns:
        Full sequences (B, P + N, C) after each stage.
    """
    x = model.stem(images)
    height, width = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    num_prefix = 0
    if model.cls_token is not None:
        num_prefix = 1
        x = torch.cat([model.cls_token.repeat(len(x), 1, 1), x], dim=1) + model.pos_embed

    alphas = iter(tradeoff)
    scores = None  # per image, a list of one score per patch
    outputs = []
    for s, stage in enumerate(model.stages):
        if s > 0:
            grid = [(row, column) for row in range(height) for column in range(width)]
            left = [i for i, (row, column) in enumerate(grid) if row % 2 == 0 and column % 2 == 0]
            x, scores = _downsample(stage.downsample, x, scores, left, num_prefix, next(alphas), (height, width))
            height, width = (height + 1) // 2, (width + 1) // 2
        of_stage = []
        x, scores = _blocks(
            stage.blocks,
            x,
            scores,
            {b: ratio for (t, b), ratio in keep_ratios.items() if t == s},
            num_prefix,
            [next(alphas) for _ in stage.blocks],
            fast_update,
            (height, width),
            of_stage,
        )
        if selected is not None:
            selected += [((s, block), slow, of) for block, slow, of in of_stage]
        outputs.append(x)
    return outputs


def _blocks(
        blocks, x, scores, keep_ratios, num_prefix, alphas, fast_update, grid_size, selected,
) -> tuple[Tensor, list]:
    batch = [list(tokens) for tokens in x]  # per image, the tokens of the full sequence
    num_patches = x.shape[1] - num_prefix
    slow = [list(range(num_patches)) for _ in batch]
    representatives = None
    for b, block in enumerate(blocks):
        if b in keep_ratios:
            num_slow = int(keep_ratios[b] * num_patches)
            ranked = [sorted(range(num_patches), key=lambda i, of=of: -of[i].item()) for of in scores]
            slow = [ranking[:num_slow] for ranking in ranked]
            if keep_ratios[b] < 1:
                selected.append((b, [set(chosen) for chosen in slow], [list(of) for of in scores]))
            representatives = None
            if fast_update and num_slow < num_patches:
                representatives = []
                for tokens, of, ranking in zip(batch, scores, ranked, strict=True):
                    total = sum(of[i] for i in ranking[num_slow:])
                    representatives.append(
                        sum(of[i] / total * tokens[num_prefix + i] for i in ranking[num_slow:]))

        present = torch.stack([
            torch.stack([
                *tokens[:num_prefix],
                *(tokens[num_prefix + i] for i in chosen),
                *([] if representatives is None else [representatives[image]]),
            ])
            for image, (tokens, chosen) in enumerate(zip(batch, slow, strict=True))
        ])
        attn = block.attn
        qkv = attn.qkv(present)
        adds, attention = [], []
        for image, chosen in enumerate(slow):
            positions = [None] * num_prefix + chosen + ([] if representatives is None else [None])
            q, k, v = qkv[image].unflatten(1, (attn.num_heads, -1)).split(
                [attn.key_dim, attn.key_dim, attn.val_dim], dim=2)
            heads = []
            for h in range(attn.num_heads):
                logits = q[:, h] @ k[:, h].T * attn.key_dim ** -0.5
                heads.append((logits + _biases(attn, h, positions, positions, grid_size)).softmax(1))
            matrix = torch.stack(heads)  # (H, L, L)
            queries = [0] if num_prefix else range(len(chosen))
            attention.append(sum(matrix[:, i].mean(0) for i in queries) / len(queries))
            adds.append(torch.cat([matrix[h] @ v[:, h] for h in range(attn.num_heads)], dim=1))
        present_after = present + attn.proj(torch.stack(adds))
        present_after = present_after + block.mlp(present_after)

        scores = _mix(scores, attention, slow, num_prefix, alphas[b])
        for image, chosen in enumerate(slow):
            tokens, after = batch[image], present_after[image]
            if representatives is not None:
                residual = after[-1] - representatives[image]
                for i in set(range(num_patches)) - set(chosen):
                    tokens[num_prefix + i] = tokens[num_prefix + i] + residual
                representatives[image] = after[-1]
            tokens[:num_prefix] = after[:num_prefix]
            for place, i in enumerate(chosen):
                tokens[num_prefix + i] = after[num_prefix + place]
    return torch.stack([torch.stack(tokens) for tokens in batch]), scores


def _downsample(downsample, x, scores, left, num_prefix, alpha, grid_size) -> tuple[Tensor, list]:
    attn = downsample.attn_downsample
    if attn.pos_embed is not None:
        x = x + attn.pos_embed
    num_patches = x.shape[1] - num_prefix
    keys = [None] * num_prefix + list(range(num_patches))
    queries = [None] * num_prefix + left
    kv = attn.kv(x)
    q = attn.q.ln(x[:, [*range(num_prefix), *(num_prefix + i for i in left)]])
    out, new_scores = [], []
    for image in range(len(x)):
        k, v = kv[image].unflatten(1, (attn.num_heads, -1)).split([attn.key_dim, attn.val_dim], dim=2)
        heads = []
        for h in range(attn.num_heads):
            logits = q[image].unflatten(1, (attn.num_heads, -1))[:, h] @ k[:, h].T * attn.key_dim ** -0.5
            heads.append((logits + _biases(attn, h, queries, keys, grid_size)).softmax(1))
        matrix = torch.stack(heads)
        out.append(torch.cat([matrix[h] @ v[:, h] for h in range(attn.num_heads)], dim=1))
        if scores is not None:
            attention = (matrix[:, 0] if num_prefix else matrix.mean(1)).mean(0)[num_prefix:]
            mixed = [(1 - alpha) * scores[image][i] + alpha * attention[i] for i in left]
            factor = sum(scores[image]) / sum(mixed)
            new_scores.append([factor * score for score in mixed])
    x = attn.proj(torch.stack(out))
    return x + downsample.mlp(x), new_scores or None


def _biases(attn, head: int, queries: list, keys: list, grid_size: tuple[int, int]) -> Tensor:
    """Biases (queries, keys) by the distance in rows and columns; none for what has no position."""
    if attn.attention_biases is None:
        return torch.zeros(1, 1, dtype=torch.float64)
    table = attn.attention_biases[head].view(grid_size)
    width = grid_size[1]
    none = torch.zeros((), dtype=table.dtype)
    return torch.stack([
        torch.stack([
            none if a is None or b is None else table[abs(a // width - b // width), abs(a % width - b % width)]
            for b in keys
        ])
        for a in queries
    ])


def _mix(scores, attention, slow, num_prefix, alpha) -> list:
    if scores is None:
        return [[a[num_prefix + i] for i in range(len(chosen))] for a, chosen in zip(attention, slow, strict=True)]
    scores = [list(of) for of in scores]
    for of, a, chosen in zip(scores, attention, slow, strict=True):
        for place, i in enumerate(chosen):
            of[i] = (1 - alpha) * of[i] + alpha * a[num_prefix + place]
    return scores
