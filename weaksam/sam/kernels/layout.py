"""Padding of prompt rows and head channels for kernels.

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
    """Padding of the rows of prompts."""

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
        """Returns the layout of tokens (B, H, T, d)."""
        return Layout(tokens.shape[1], tokens.shape[3], tokens.shape[2])

    def pad_rows(self, x: Tensor, axis: int) -> Tensor:
        """Pads H T rows along an axis."""
        shape = (self.heads, self.num_tokens)
        x = x.unflatten(axis, shape)
        widths = [0, 0] * (x.ndim - axis - 2) + [0, self.tokens - shape[1], 0, self.padded_heads - shape[0]]
        return F.pad(x, widths).flatten(axis, axis + 1)

    def cut_rows(self, x: Tensor, axis: int) -> Tensor:
        """Inverts `pad_rows`."""
        x = x.unflatten(axis, (self.padded_heads, self.tokens))
        return x.narrow(axis, 0, self.heads).narrow(axis + 1, 0, self.num_tokens).flatten(axis, axis + 1)

    def pad_square(self, x: Tensor) -> Tensor:
        """Pads (B, H T, H T) to (B, rows, rows)."""
        return self.pad_rows(self.pad_rows(x, 1), 2)

    def lay_out(self, x: Tensor) -> Tensor:
        """Lays out (B, H, T, d) as (B, rows, channels), zero where row and channel belong to different heads."""
        apart = torch.eye(self.heads, device=x.device, dtype=x.dtype)[:, None, :, None] * x[:, :, :, None]
        rows = self.pad_rows(apart.flatten(3).flatten(1, 2), 1)
        return F.pad(rows, (0, self.channels - rows.shape[2]))

    def take_heads(self, x: Tensor) -> Tensor:
        """Inverts `lay_out`, for rows that may be nonzero at other heads' channels."""
        x = self.cut_rows(x, 1)[..., : self.heads * self.head_dim]
        x = x.unflatten(2, (self.heads, -1)).unflatten(1, (self.heads, -1))  # (B, H, T, H, d)
        return x.diagonal(0, 1, 3).permute(0, 3, 1, 2)

    def lay_out_shared(self, x: Tensor) -> Tensor:
        """Lays out (H, d, N) as (channels, N)."""
        x = x.flatten(0, 1)
        return F.pad(x, (0, 0, 0, self.channels - len(x)))
