"""WeakTr: a vision transformer with one class token per class, which classifies an image and locates its classes.

Source: WeakTr (arXiv 2304.01184) as WeakSAM (arXiv 2402.14812) uses it; module names are those of the published
checkpoints. Four departures, each named in the code: attention maps are fused by their plain mean unless the
published gate is enabled, attention is reduced layer by layer instead of being stored, the caller decides which samples
skip a residual branch, and a small variant for the demo world uses a SAM as its patch embedding.

Axis legend: B images, C classes, h w patches (P = h w), N = C + P tokens, D channels, L layers, A heads of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weaksam.data.augment import IMAGE_MEAN, IMAGE_STD
from weaksam.models.backbones.frozen_sam import SamStem

FineOf = Literal["both", "coarse", "cross"]
_GATE_REDUCTION = 4  # of the gate's hidden layer, as in the published code


@dataclass(frozen=True)
class WeakTrSize:
    """Size of the transformer."""

    dim: int
    depth: int
    heads: int
    patch: int = 16  # pixels
    grid: int = 14  # side of the patch grid that the position embedding was learnt for
    eps: float = 1e-6  # of the layer norms
    sam: str | None = None  # patches are embedded by the frozen image encoder of this SAM instead of one product


@dataclass(frozen=True)
class Logits:
    """Image-level logits, each (B, C) float.

    Attributes:
        cls: mean channel of each class token.
        patch: mean of the coarse map before its ReLU.
        fine: mean of the fine map; trains only the gate, so it is None without a gate.
    """

    cls: Tensor
    patch: Tensor
    fine: Tensor | None


@dataclass(frozen=True)
class Maps:
    """Class maps at patch resolution, not normalised.

    Attributes:
        logits: (B, C) logits of the class tokens.
        coarse: (B, C, h, w) class activation map.
        fine: (B, C, h, w) coarse map times cross attention, or one of them, propagated by patch attention.
        cross: (B, K, C, h, w) attention of class tokens to patches, a map per head of each chosen layer.
    """

    logits: Tensor
    coarse: Tensor
    fine: Tensor
    cross: Tensor


class PatchEmbed(nn.Module):
    """Embeds non-overlapping patches: (B, 3, H, W) to (B, h, w, D); pixels beyond the last whole patch are ignored."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Multi-head self-attention that can expose its weights."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, show: Callable[[Tensor], None] | None = None) -> Tensor:
        """`show` is called with the (B, A, N, N) weights; without it they are never formed."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if show is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
            show(weights)
            out = weights @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a hidden layer four times as wide."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, size: WeakTrSize) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.dim, eps=size.eps)
        self.attn = Attention(size.dim, size.heads)
        self.norm2 = nn.LayerNorm(size.dim, eps=size.eps)
        self.mlp = Mlp(size.dim)

    def forward(self, x: Tensor, keep: Tensor | None = None, show: Callable[[Tensor], None] | None = None) -> Tensor:
        """`keep` (B, 2) multiplies the two residual branches of each sample."""
        attended = self.attn(self.norm1(x), show)
        x = x + (attended if keep is None else attended * keep[:, 0, None, None])
        changed = self.mlp(self.norm2(x))
        return x + (changed if keep is None else changed * keep[:, 1, None, None])


class AttentionGate(nn.Module):
    """The published adaptive fusion: a weight in (0, 1) per head and layer, made from the mean of each attention map.

    Rows of attention sum to one, so that mean is 1 / N for every map of every image: the gate depends on the number of
    tokens only and the maps are not needed. Channels are head-major: head * L + layer.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // _GATE_REDUCTION
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False), nn.Sigmoid()
        )

    def forward(self, num_tokens: int) -> Tensor:
        """(channels,) weights."""
        first = cast(nn.Linear, self.fc[0]).weight
        return self.fc(first.new_full((first.shape[1],), 1 / num_tokens))


class WeakTr(nn.Module):
    """The network.

    Args:
        num_classes: C, one class token each.
        size: of the transformer.
        gated: fuse attention maps by the published gate instead of their mean.
        fine_of: input of patch attention for the fine map: the coarse map times cross attention, or one of them.
    """

    mean, std = IMAGE_MEAN, IMAGE_STD  # of pixels in [0, 1]

    def __init__(self, num_classes: int, size: WeakTrSize, *, gated: bool = False, fine_of: FineOf = "both") -> None:
        super().__init__()
        if fine_of not in get_args(FineOf):
            raise ValueError(f"fine_of must be one of {', '.join(get_args(FineOf))}, got {fine_of!r}")
        self.num_classes, self.size, self.fine_of = num_classes, size, fine_of
        self.patch, self.depth = size.patch, size.depth
        self.patch_embed = SamStem(size.sam, size.dim) if size.sam else PatchEmbed(size.dim, size.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, num_classes, size.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_classes + size.grid**2, size.dim))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        # Published checkpoints hold this norm, the published forward does not apply it; nor is it trained.
        self.norm = nn.LayerNorm(size.dim, eps=size.eps).requires_grad_(False)
        self.head = nn.Conv2d(size.dim, num_classes, 3, padding=1)
        self.adaptive_attention_fusion = AttentionGate(size.depth * size.heads) if gated else None
        self._initialise()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.cls_token.device

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Logits:
        """Image-level logits.

        Args:
            images: (B, 3, H, W) float, normalised; sides of at least one patch.
            keep: (B, L, 2) factors of the residual branches (stochastic depth, already divided by the keep
                probability). An argument, so that they depend on the sample and not on its worker.
        """
        columns, rows = [], []

        def watch(weights: Tensor) -> None:
            classes = self.num_classes
            attention = weights.detach()
            columns.append(attention[:, :, classes:, classes:].mean(2))  # only the column means of P x P are needed
            rows.append(attention[:, :, :classes, classes:])

        x, hw = self._run(images, keep, watch if self.adaptive_attention_fusion else None)
        cls, activation = self._read(x, hw)
        fine = None
        if self.adaptive_attention_fusion:
            gates = self._gates(x.shape[1]).unsqueeze(-1)  # (L, A, 1)
            spread = (torch.stack(columns, 1) * gates).mean((1, 2))  # (B, P)
            cross = (torch.stack(rows, 1) * gates.unsqueeze(-1)).mean((1, 2))  # (B, C, P)
            coarse = activation.detach().relu().flatten(2)
            fine = (self._fused(cross, coarse) * spread.unsqueeze(1)).sum(-1)
        return Logits(cls, activation.mean((2, 3)), fine)

    @torch.no_grad()
    def find_maps(self, images: Tensor, *, cross_layers: Sequence[int]) -> Maps:
        """Returns maps of every class.

        Args:
            images: (B, 3, H, W) float, normalised.
            cross_layers: 0-based layers of the cross maps' heads, in rising order.
        """
        classes, layers = self.num_classes, set(cross_layers)
        mean, rows, for_layer = images.new_zeros(()), [], iter(range(self.size.depth))
        gates = self._gates(classes + self._num_patches(images))

        def watch(weights: Tensor) -> None:
            nonlocal mean
            layer = next(for_layer)
            mean = mean + torch.einsum("a,banm->bnm", gates[layer], weights) / gates.numel()
            if layer in layers:
                rows.append(weights[:, :, :classes, classes:])

        x, hw = self._run(images, None, watch)
        logits, activation = self._read(x, hw)
        coarse = activation.relu()
        fused = self._fused(mean[:, :classes, classes:], coarse.flatten(2))
        fine = fused @ mean[:, classes:, classes:].transpose(1, 2)
        cross = torch.cat(rows, 1) if rows else fine.new_zeros(len(fine), 0, *fine.shape[1:])
        return Maps(logits, coarse, fine.unflatten(2, hw), cross.unflatten(3, hw))

    def _fused(self, cross: Tensor, coarse: Tensor) -> Tensor:
        """Returns the input of patch attention, of two maps (B, C, P)."""
        return {"both": lambda: cross * coarse, "coarse": lambda: coarse, "cross": lambda: cross}[self.fine_of]()

    def _num_patches(self, images: Tensor) -> int:
        return (images.shape[2] // self.size.patch) * (images.shape[3] // self.size.patch)

    def _gates(self, num_tokens: int) -> Tensor:
        """Returns (L, A) weights of the attention maps."""
        depth, heads = self.size.depth, self.size.heads
        if self.adaptive_attention_fusion is None:
            # Differs from the published code, whose gate stays at its random start with the published checkpoints
            # (0.4993 to 0.5006 everywhere): the plain mean is the same up to a factor.
            return self.head.weight.new_ones(depth, heads)
        return self.adaptive_attention_fusion(num_tokens).view(heads, depth).t()

    def _run(
        self, images: Tensor, keep: Tensor | None, show: Callable[[Tensor], None] | None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Returns tokens (B, N, D) after the last layer, and (h, w)."""
        patches = self.patch_embed(images)
        hw = (patches.shape[1], patches.shape[2])
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(1, 2)], 1)
        x = x + resize_positions(self.pos_embed, self.num_classes, hw)
        for layer, block in enumerate(self.blocks):
            x = block(x, None if keep is None else keep[:, layer], show)
        return x, hw

    def _read(self, x: Tensor, hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Returns logits (B, C) of the class tokens and the activation map (B, C, h, w)."""
        patches = x[:, self.num_classes :].transpose(1, 2).unflatten(2, hw)
        return x[:, : self.num_classes].mean(-1), self.head(patches)


def resize_positions(pos_embed: Tensor, num_classes: int, hw: tuple[int, int]) -> Tensor:
    """Resizes a position embedding (1, C + P, D) to another patch grid; the class tokens' part is unchanged.

    Bicubic, by the factor (side + 0.1) / grid of the published checkpoints: resizing to the exact size
    instead moves entries by 0.1 to 0.2.
    """
    patches = pos_embed[:, num_classes:]
    side = round(patches.shape[1] ** 0.5)
    if hw == (side, side):
        return pos_embed
    grid = patches.transpose(1, 2).unflatten(2, (side, side))
    factor = [(hw[0] + 0.1) / side, (hw[1] + 0.1) / side]
    grid = F.interpolate(grid, scale_factor=factor, mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :num_classes], grid.flatten(2).transpose(1, 2)], 1)
