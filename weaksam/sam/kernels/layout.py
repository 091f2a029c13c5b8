"""How rows of prompts and channels of heads are padded for kernels.

Rows are padded to powers of two, T to `tokens` and H to `padded_heads`, so R = padded_heads * tokens. The heads of an
attention share one product: vectors of a head are laid into a row of D channels that is zero elsewhere.

Axis legend: B prompts, T prompt tokens, H heads, d channels of a head, D = H d, N image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Layout:
    """How rows of prompts are padded."""

    heads: int
    head_dim: int
    num_tokens: int

    @property
    def tokens(self) -> int:
        return triton.next_power_of_2(self.num_tokens)

    @property
    def padded_heads(self) -> int:
        # products have at least 16 rows
        return triton.next_power_of_2(max(self.heads, -(-16 // self.tokens)))

    @property
    def rows(self) -> int:
        return self.padded_heads * self.tokens

    @property
    def channels(self) -> int:
        return max(16, triton.next_power_of_2(self.heads * self.head_dim))

    @staticmethod
    def of(tokens: Tensor) -> Layout:
        """Of (B, H, T, d)."""
        return Layout(tokens.shape[1], tokens.shape[3], tokens.shape[2])

    def pad_rows(self, x: Tensor, axis: int) -> Tensor:
        """H T rows along an axis to padded ones."""
        shape = (self.heads, self.num_tokens)
        x = x.unflatten(axis, shape)
        widths = [0, 0] * (x.ndim - axis - 2) + [0, self.tokens - shape[1], 0, self.padded_heads - shape[0]]
        return F.pad(x, widths).flatten(axis, axis + 1)

    def cut_rows(self, x: Tensor, axis: int) -> Tensor:
        """The inverse of `pad_rows`."""
        x = x.unflatten(axis, (self.padded_heads, self.tokens))
        return x.narrow(axis, 0, self.heads).narrow(axis + 1, 0, self.num_tokens).flatten(axis, axis + 1)

    def pad_square(self, x: Tensor) -> Tensor:
        """(B, H T, H T) to (B, rows, rows)."""
        return self.pad_rows(self.pad_rows(x, 1), 2)

    def lay_out(self, x: Tensor) -> Tensor:
        """(B, H, T, d) to (B, rows, channels), zero but where row and channel are of one head."""
        apart = torch.eye(self.heads, device=x.device, dtype=x.dtype)[:, None, :, None] * x[:, :, :, None]
        rows = self.pad_rows(apart.flatten(3).flatten(1, 2), 1)
        return F.pad(rows, (0, self.channels - rows.shape[2]))

    def take_heads(self, x: Tensor) -> Tensor:
        """The inverse of `lay_out`, of rows that are not zero elsewhere."""
        x = self.cut_rows(x, 1)[..., : self.heads * self.head_dim]
        x = x.unflatten(2, (self.heads, -1)).unflatten(1, (self.heads, -1))  # (B, H, T, H, d)
        return x.diagonal(0, 1, 3).permute(0, 3, 1, 2)

    def lay_out_shared(self, x: Tensor) -> Tensor:
        """(H, d, N) to (channels, N)."""
        x = x.flatten(0, 1)
        return F.pad(x, (0, 0, 0, self.channels - len(x)))
