"""A second implementation of selection by similarity that is easy to check: one image, lists of groups of patches."""
import torch
from slow_evolution import embed, run_block
from torch import Tensor


def average_slowly(model, images: Tensor, shares: list[float], selected: list | None = None) -> list[Tensor]:
    """Run the blocks of a timm ViT, whose patch tokens are averaged into others where the share falls.

    Args:
        model: The ViT whose embedding, blocks and norm are used.
        images: Images (B, C, H, W).
        shares: Share of the patch tokens that goes through each block.
        selected: Gets block and groups of patches, the leader first, of each event, a list of these for each image.

    Returns:
        Full sequences (B, P + N, C) after each block.
    """
    sequences, ropes = embed(model, images)
    height, width = model.patch_embed.dynamic_feat_size(images.shape[2:])
    if sequences.shape[1] != model.num_prefix_tokens + height * width:
        width = None  # patches are dropped, so the others are no grid
    selected = [] if selected is None else selected
    selected += [[] for _ in sequences]
    per_image = [
        _average_image(model, x, rope, shares, width, of_image)
        for x, rope, of_image in zip(sequences, ropes, selected, strict=True)
    ]
    return [torch.stack(outputs) for outputs in zip(*per_image, strict=True)]


class Group:
    """Patches that go through the blocks as one token."""

    def __init__(self, place: int, token: Tensor) -> None:
        self.places = [place]  # the first is that of the group
        self.token = token
        self.size = torch.ones((), dtype=token.dtype)


def _average_image(model, x: Tensor, rope, shares: list[float], width: int | None, selected: list) -> list[Tensor]:
    num_prefix = model.num_prefix_tokens
    prefix, patches = list(x[:num_prefix]), list(x[num_prefix:])
    groups = [Group(place, token) for place, token in enumerate(patches)]
    outputs = []
    for i, block in enumerate(model.blocks):
        num_left = int(shares[i] * len(patches))
        if num_left < len(groups):
            groups = _hand_over(model, groups, num_left, width if len(groups) == len(patches) else None)
            selected.append((i, [list(group.places) for group in groups]))

        log_size = torch.stack([torch.zeros((), dtype=x.dtype)] * num_prefix + [group.size.log() for group in groups])
        tokens = torch.stack(prefix + [group.token for group in groups])
        rotations = None if rope is None else {
            num_prefix + t: rope[i, :, group.places[0]] for t, group in enumerate(groups)}
        tokens, _ = run_block(model, block, tokens, len(groups), log_size.detach(), rotations)

        prefix = list(tokens[:num_prefix])
        for group, token in zip(groups, tokens[num_prefix:], strict=True):
            for place in group.places:
                patches[place] = patches[place] + (token - group.token)
            group.token = token
        outputs.append(torch.stack(prefix + patches))
    return outputs


def _hand_over(model, groups: list[Group], num_left: int, width: int | None) -> list[Group]:
    """Average groups into others until some number is left; the groups are a whole grid if it has a width."""
    ranks = [sum(divmod(group.places[0], width)) if width else i for i, group in enumerate(groups)]
    sources = [group for group, rank in zip(groups, ranks, strict=True) if rank % 2 == 0]
    targets = [group for group, rank in zip(groups, ranks, strict=True) if rank % 2 == 1]

    losses = {}
    for source in sources:
        loss_of = {target: _loss(model, source, target) for target in targets}
        nearest = min(targets, key=loss_of.get)
        losses[source] = (loss_of[nearest], nearest)
    going = sorted(sources, key=lambda source: losses[source][0])[:len(groups) - num_left]

    for target in targets:
        members = [target] + [source for source in going if losses[source][1] is target]
        if len(members) == 1:
            continue
        total = sum(member.size for member in members)
        mean = sum(member.size * member.token for member in members) / total
        length = sum(member.size * member.token.norm() for member in members) / total
        target.places = [place for member in members for place in member.places]
        target.size = (total * mean.norm() / length).detach()
        target.token = mean * length / mean.norm()
    return [group for group in groups if group not in going]


def _loss(model, a: Group, b: Group) -> float:
    """Loss of the average of two groups."""
    features = [model.norm(group.token) for group in (a, b)]
    cosine = features[0] @ features[1] / (features[0].norm() * features[1].norm())
    return ((1 - cosine) * a.size * b.size / (a.size + b.size)).item()
