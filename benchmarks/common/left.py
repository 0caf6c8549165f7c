""" How similar the outputs of a model with fewer tokens are to those of the dense model with the same weights """
from collections.abc import Callable, Collection, Iterator

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div, nll_loss, normalize

from .saliency import Decoder

NUM_NEIGHBOURS = 5


class Features:
    """Comparison of the features of photos, and of the maps that a decoder makes from them.

    The class token is that of `model(images)`. Patch tokens and maps are from `model.forward_features(images)` of a
    model that returns its whole grid. Tokens are compared by their cosine, after subtraction of the mean of the dense
    ones. Maps are compared by their correlation. Neighbours are searched among the class tokens of the dense model, as
    in an index that was made with it.

    Args:
        dense: The dense model.
        decoder: Decoder from patch tokens to maps.
        photos: Bytes (N, 3, H, W), on any device.
        batch_size: Number of photos in a batch.
        device: Device on which models run.
    """
    COLUMNS = {
        'class_token': 'class token', 'neighbours': f'{NUM_NEIGHBOURS} neighbours', 'patch_tokens': 'patch tokens',
        'saliency': 'saliency'}
    FORMAT = '.3f'

    def __init__(
            self,
            dense: VisionTransformer,
            decoder: Decoder,
            photos: Tensor,
            batch_size: int,
            device: torch.device,
    ) -> None:
        self.decoder, self.photos, self.batch_size, self.device = decoder, photos, batch_size, device
        self.mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=device).view(3, 1, 1)
        self.std = torch.tensor(IMAGENET_DEFAULT_STD, device=device).view(3, 1, 1)
        self.dense = dense

    def __len__(self) -> int:
        return -(-len(self.photos) // self.batch_size)

    def batches(self, noise: Tensor | None = None) -> Iterator[Tensor]:
        """Photos as models take them (B, 3, H, W), with noise in grey levels (N, 3, H, W) added, if any is given."""
        photos = self.photos if noise is None else (self.photos + noise).clamp(0, 255)
        yield from map(self.prepare, photos.split(self.batch_size))

    def prepare(self, photos: Tensor) -> Tensor:
        """Bytes (B, 3, H, W) as models take them."""
        return (photos.to(self.device) / 255 - self.mean) / self.std

    def _map(self, tokens: Tensor) -> Tensor:
        maps = self.decoder(tokens, self.photos.shape[2]).flatten(1)
        return maps - maps.mean(dim=1, keepdim=True)

    @torch.inference_mode()
    def measure_dense(self, report: Callable[[], None]) -> dict[str, float]:
        """Store the outputs of the dense model, and return its own results, which are all 1."""
        class_tokens, self.patch_tokens, self.maps = [], [], []
        for images in self.batches():
            tokens = self.dense.forward_features(images)
            class_tokens.append(self.dense.forward_head(tokens))
            self.patch_tokens.append(tokens[:, self.dense.num_prefix_tokens:])
            self.maps.append(self._map(self.patch_tokens[-1]))
            report()
        class_tokens = torch.cat(class_tokens)
        self.class_mean = class_tokens.mean(dim=0)
        self.class_tokens = class_tokens - self.class_mean
        self.patch_mean = torch.stack([tokens.sum(dim=(0, 1)) for tokens in self.patch_tokens]).sum(dim=0)
        self.patch_mean = self.patch_mean / sum(tokens[..., 0].numel() for tokens in self.patch_tokens)
        return dict.fromkeys(self.COLUMNS, 1.)

    def _neighbours(self, class_tokens: Tensor) -> Tensor:
        """Indices of the nearest other photos of each photo (N, NUM_NEIGHBOURS)."""
        likeness = normalize(class_tokens, dim=1) @ normalize(self.class_tokens, dim=1).T
        return likeness.fill_diagonal_(-torch.inf).topk(min(NUM_NEIGHBOURS, len(likeness) - 1), dim=1)[1]

    @torch.inference_mode()
    def measure(self, model: nn.Module, has_grid: bool, report: Callable[[], None]) -> dict[str, float]:
        """Similarity to the dense model, by the names in `COLUMNS`. `measure_dense` must be called before.

        Args:
            model: Model that returns class tokens.
            has_grid: Whether its `forward_features` returns all patch tokens.
            report: Function that is called after each batch.
        """
        class_tokens, likeness, correlation = [], [], []
        for images, dense_tokens, dense_map in zip(self.batches(), self.patch_tokens, self.maps, strict=True):
            class_tokens.append(model(images))
            if has_grid:
                tokens = model.forward_features(images)[:, -dense_tokens.shape[1]:]
                likeness.append(cosine_similarity(tokens - self.patch_mean, dense_tokens - self.patch_mean, dim=2))
                correlation.append(cosine_similarity(self._map(tokens), dense_map, dim=1))
            report()
        class_tokens = torch.cat(class_tokens) - self.class_mean
        dense_neighbours, neighbours = self._neighbours(self.class_tokens), self._neighbours(class_tokens)
        is_kept = (dense_neighbours.unsqueeze(2) == neighbours.unsqueeze(1)).any(dim=2)
        left = {
            'class_token': cosine_similarity(class_tokens, self.class_tokens, dim=1).mean().item(),
            'neighbours': is_kept.float().mean().item(),
        }
        if has_grid:
            left |= {
                'patch_tokens': torch.cat(likeness).mean().item(), 'saliency': torch.cat(correlation).mean().item()}
        return left


class Classes:
    """Accuracy of a classifier, and comparison of its predictions with those of the dense model.

    Shares are in percent, loss and Kullback-Leibler divergence in nats.

    Args:
        dense: The dense model.
        batches: Images and labels, in the same order each time.
        is_unseen: Which images were not used for any choice (N,). Their divergence has its own column.
    """
    COLUMNS = {
        'top1': 'top-1', 'top5': 'top-5', 'loss': 'loss', 'changed': 'other classes than dense', 'kl': 'KL to dense',
        'kl_unseen': 'KL, unseen'}
    FORMAT = '.2f'

    def __init__(
            self,
            dense: VisionTransformer,
            batches: Collection[tuple[Tensor, Tensor]],
            is_unseen: Tensor | None = None,
    ) -> None:
        self.dense, self.batches, self.is_unseen = dense, batches, is_unseen

    def __len__(self) -> int:
        return len(self.batches)

    @torch.inference_mode()
    def _predict(self, model: nn.Module, report: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """Log-probabilities (N, num_classes) and labels (N,)."""
        logits, labels = [], []
        for images, targets in self.batches:
            logits.append(model(images).float())
            labels.append(targets)
            report()
        return torch.cat(logits).log_softmax(dim=1), torch.cat(labels)

    def measure_dense(self, report: Callable[[], None]) -> dict[str, float]:
        """Store the predictions of the dense model, and return its own results."""
        self.log_probs, labels = self._predict(self.dense, report)
        return self._compare(self.log_probs, labels)

    def measure(self, model: nn.Module, has_grid: bool, report: Callable[[], None]) -> dict[str, float]:
        """Accuracy and comparison, by the names in `COLUMNS`. `measure_dense` must be called before."""
        return self._compare(*self._predict(model, report))

    def _compare(self, log_probs: Tensor, labels: Tensor) -> dict[str, float]:
        def percent(is_so: Tensor) -> float:
            return 100 * is_so.double().mean().item()

        ranked = log_probs.topk(min(5, log_probs.shape[1]), dim=1)[1]
        divergence = kl_div(log_probs, self.log_probs, log_target=True, reduction='none').sum(dim=1)
        result = {
            'top1': percent(ranked[:, 0] == labels),
            'top5': percent((ranked == labels.unsqueeze(1)).any(dim=1)),
            'loss': nll_loss(log_probs, labels).item(),
            'changed': percent(ranked[:, 0] != self.log_probs.argmax(dim=1)),
            'kl': divergence.mean().item(),
        }
        return result if self.is_unseen is None else {
            **result, 'kl_unseen': divergence[self.is_unseen].mean().item()}
