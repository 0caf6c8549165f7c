"""A second implementation of token evolution that is easy to check: one image at a time, with lists of tokens."""
import torch
from torch import Tensor


def evolve_slowly(
        model,
        images: Tensor,
        keep_ratios: dict[int, float],
        tradeoff: list[float],
        fast_update: bool,
        selected: list | None = None,
) -> list[Tensor]:
    """Run the blocks of a timm ViT with token evolution.

    Args:
        model: The ViT whose embedding and blocks are used.
        images: Images (B, C, H, W).
        keep_ratios: Share of slow tokens by the first block of each segment.
        tradeoff: alpha of each block.
        fast_update: Whether placeholders follow the representative token.
        selected: Gets block, slow patches and scores of all patches of each selection, a list of these for each image.

    Returns:
        Full sequences (B, P + N, C) after each block.
    """
    sequences, ropes = embed(model, images)
    selected = [] if selected is None else selected
    selected += [[] for _ in sequences]
    per_image = [
        _evolve_image(model, x, rope, keep_ratios, tradeoff, fast_update, of_image)
        for x, rope, of_image in zip(sequences, ropes, selected, strict=True)
    ]
    return [torch.stack(outputs) for outputs in zip(*per_image, strict=True)]


def embed(model, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Sequences (B, P + N, C), and for each image the rotations of its patches by block and head (D, H, N, 2 * d)."""
    x, rope = model._pos_embed(model.patch_embed(images)), None
    if isinstance(x, tuple):
        x, rope = x
    x = model.norm_pre(x)
    if rope is None:
        return x, [None] * len(x)
    if not model.rope_mixed:
        rope = rope.unsqueeze(0)  # for all blocks
    if rope.ndim == (3 if not model.rope_mixed else 4):
        rope = rope.unsqueeze(1).expand(-1, len(x), *rope.shape[1:])  # for all images
    if rope.ndim == 4:
        rope = rope.unsqueeze(2)  # for all heads
    heads, blocks = model.blocks[0].attn.num_heads, len(model.blocks)
    return x, list(rope.expand(blocks, -1, heads, -1, -1).unbind(1))


def _evolve_image(model, x, rope, keep_ratios, tradeoff, fast_update, selected) -> list[Tensor]:
    num_prefix = model.num_prefix_tokens
    prefix, patches = list(x[:num_prefix]), list(x[num_prefix:])
    scores = None
    slow = list(range(len(patches)))  # patches that go through the blocks
    representative = None
    outputs = []
    for i, block in enumerate(model.blocks):
        if i in keep_ratios:
            representative = None
            ranked = sorted(range(len(patches)), key=lambda j: -1 if scores is None else -scores[j].item())
            slow = ranked[:int(keep_ratios[i] * len(patches))]
            placeholders = ranked[len(slow):]
            if keep_ratios[i] < 1:
                selected.append((i, set(slow), list(scores)))
            if placeholders and fast_update:
                total = sum(scores[j] for j in placeholders)
                representative = sum(scores[j] / total * patches[j] for j in placeholders)

        tokens = prefix + [patches[j] for j in slow] + ([] if representative is None else [representative])
        rotations = None if rope is None else {num_prefix + t: rope[i, :, j] for t, j in enumerate(slow)}
        tokens, attention = run_block(model, block, torch.stack(tokens), len(slow), rotations=rotations)

        attention = attention[num_prefix:num_prefix + len(slow)]
        if scores is None:
            scores = list(attention)
        else:
            for j, a in zip(slow, attention, strict=True):
                scores[j] = (1 - tradeoff[i]) * scores[j] + tradeoff[i] * a

        prefix = list(tokens[:num_prefix])
        for j, token in zip(slow, tokens[num_prefix:], strict=False):
            patches[j] = token
        if representative is not None:
            residual = tokens[-1] - representative
            for j in range(len(patches)):
                if j not in slow:
                    patches[j] = patches[j] + residual
            representative = tokens[-1]
        outputs.append(torch.stack(prefix + patches))
    return outputs


def run_block(
        model,
        block,
        x: Tensor,
        num_slow: int,
        log_size: Tensor | float = 0.,
        rotations: dict[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One block on the tokens (L, C) of one image, and the attention (L,) that scores them.

    A token counts as several equal tokens: the logarithm of its size (L,) is added to the products. Tokens with a
    position have a rotation (H, 2 * d), by their position among the tokens.
    """
    kind = type(block).__name__
    if kind in ('EvaBlock', 'EvaBlockPostNorm'):
        return _run_eva_block(model, block, x, num_slow, log_size, rotations or {})
    if kind == 'ParallelThingsBlock':
        outs, attentions = zip(*(
            _attend(model, part.attn, part.attn.qkv(part.norm(x)), num_slow, log_size) for part in block.attns
        ), strict=True)
        x = x + sum(part.ls(part.attn.proj(out)) for part, out in zip(block.attns, outs, strict=True))
        return x + sum(part.ls(part.mlp(part.norm(x))) for part in block.ffns), sum(attentions)
    if kind == 'ParallelScalingBlock':
        features = block.in_norm(x) @ block.in_proj.weight.T
        if block.in_proj.bias is not None:
            features = features + block.in_proj.bias
        hidden = block.mlp_out_proj.in_features
        if block.mlp_bias is not None:
            others = torch.zeros(features.shape[1] - hidden, dtype=x.dtype)
            is_last = hasattr(block, 'qkv_bias')  # an older timm adds it to the last features, whatever they are
            features = features + torch.cat([others, block.mlp_bias] if is_last else [block.mlp_bias, others])
        out, attention = _attend(model, block, features[:, hidden:], num_slow, log_size)
        mlp = block.mlp_out_proj(block.mlp_act(features[:, :hidden]))
        return x + block.ls(block.attn_out_proj(out) + mlp), attention
    if kind == 'ResPostBlock':
        out, attention = _attend(model, block.attn, block.attn.qkv(x), num_slow, log_size)
        x = x + block.norm1(block.attn.proj(out))
        return x + block.norm2(block.mlp(x)), attention
    out, attention = _attend(model, block.attn, block.attn.qkv(block.norm1(x)), num_slow, log_size)
    x = x + block.ls1(block.attn.proj(out))
    return x + block.ls2(block.mlp(block.norm2(x))), attention


def _attend(model, attn, qkv: Tensor, num_slow: int, log_size: Tensor | float) -> tuple[Tensor, Tensor]:
    """What an attention gathers (L, C) by queries, keys and values (L, 3 * C), and what scores the tokens (L,)."""
    num_tokens = len(qkv)
    q, k, v = qkv.reshape(num_tokens, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
    q, k = attn.q_norm(q), attn.k_norm(k)
    out = (q @ k.transpose(1, 2) * attn.scale + log_size).softmax(-1) @ v

    num_prefix = model.num_prefix_tokens
    query = q[:, 0] if model.has_class_token else q[:, num_prefix:num_prefix + num_slow].mean(1)
    attention = ((query.unsqueeze(1) * k).sum(-1) * attn.scale).softmax(-1).sum(0)
    return out.transpose(0, 1).reshape(num_tokens, -1), attention


def _run_eva_block(model, block, x, num_slow, log_size, rotations) -> tuple[Tensor, Tensor]:
    if type(block).__name__ == 'EvaBlockPostNorm':
        out, attention = _attend_rotated(model, block.attn, x, num_slow, log_size, rotations)
        x = x + block.norm1(out)
        return x + block.norm2(block.mlp(x)), attention
    out, attention = _attend_rotated(model, block.attn, block.norm1(x), num_slow, log_size, rotations)
    x = x + (out if block.gamma_1 is None else block.gamma_1 * out)
    out = block.mlp(block.norm2(x))
    return x + (out if block.gamma_2 is None else block.gamma_2 * out), attention


def _attend_rotated(model, attn, x, num_slow, log_size, rotations) -> tuple[Tensor, Tensor]:
    """What an attention of timm's `Eva` gives (L, C), and what scores the tokens (L,)."""
    if attn.qkv is None:
        q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    else:
        q, k, v = attn.qkv(x).chunk(3, dim=1)
        if getattr(attn, 'q_bias', None) is not None:
            q, v = q + attn.q_bias, v + attn.v_bias
    head_dim = q.shape[1] // attn.num_heads
    q, k, v = (y.view(len(x), -1, head_dim).transpose(0, 1) for y in (q, k, v))
    q, k = attn.q_norm(q), attn.k_norm(k)
    group = attn.num_heads // len(k)  # so many heads share a key
    q, k, v = q, k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    q, k = (
        torch.stack([
            _rotate(y[:, j], rotations[j], attn.rotate_half) if j in rotations else y[:, j] for j in range(len(x))], 1)
        for y in (q, k)
    )
    out = (q @ k.transpose(1, 2) * attn.scale + log_size).softmax(-1) @ v
    out = attn.norm(out.transpose(0, 1).reshape(len(x), -1))
    if getattr(attn, 'gate', None) is not None:
        out = out * attn.gate(x).sigmoid()

    num_prefix = model.num_prefix_tokens
    query = q[:, 0] if model.has_class_token else q[:, num_prefix:num_prefix + num_slow].mean(1)
    attention = ((query.unsqueeze(1) * k).sum(-1) * attn.scale).softmax(-1).sum(0)
    return attn.proj(out), attention


def _rotate(x: Tensor, rotation: Tensor, half: bool) -> Tensor:
    """Turn pairs of channels of one token (H, d), those of the two halves or neighbours, by angles (H, 2 * d)."""
    sin, cos = rotation.chunk(2, dim=1)
    d = x.shape[1]
    pairs = [(c, c + d // 2) for c in range(d // 2)] if half else [(c, c + 1) for c in range(0, d, 2)]
    turned = [torch.zeros(())] * d
    for a, b in pairs:
        turned[a] = x[:, a] * cos[:, a] - x[:, b] * sin[:, a]
        turned[b] = x[:, b] * cos[:, b] + x[:, a] * sin[:, b]
    return torch.stack(turned, dim=1)


def assert_equal_after_every_block(model, images: Tensor, expected: list[Tensor], settings: str) -> None:
    """Compare all that a model gives, in float64, with full sequences (B, P + N, C) after each block."""
    final, intermediates = model.forward_intermediates(images, output_fmt='NLC', return_prefix_tokens=True)
    if model.num_prefix_tokens:
        intermediates = [torch.cat([prefix, patches], dim=1) for patches, prefix in intermediates]
    for i, (actual, wanted) in enumerate(zip(intermediates, expected, strict=True)):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9, msg=lambda m, i=i: f'block {i}, {settings}: {m}')
    torch.testing.assert_close(final, model.norm(expected[-1]), rtol=0, atol=1e-9)
    torch.testing.assert_close(model(images), model.forward_head(model.norm(expected[-1])), rtol=0, atol=1e-9)


def assert_equal_gradients(model, logits: Tensor, expected: Tensor, atol: dict[str, float] | None = None) -> None:
    """Compare the gradients of all parameters by two ways to logits, within 1e-9 or what `atol` says of a parameter."""
    parameters = dict(model.named_parameters())

    def gradients(logits):
        weight = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
        return torch.autograd.grad((logits * weight).sum(), parameters.values(), allow_unused=True)

    for name, a, e in zip(parameters, gradients(logits), gradients(expected), strict=True):
        assert (a is None) == (e is None), name
        if e is not None:
            bound = (atol or {}).get(name, 1e-9) * max(1, e.abs().max().item())
            torch.testing.assert_close(a, e, rtol=0, atol=bound, msg=name)
