"""Mask logits of decoded prompts, in plain PyTorch: upscaled image tokens times the hypernetwork vector of each mask.

`decoder` explains the symbols. `kernels.mask_head` computes the same without a tensor of upscaled tokens.

Axis legend: K prompts chosen, S mask slots, N image tokens, n tokens inside the unpadded image, R = heads * tokens of a
prompt, u channels after the first upscaling, c after the second.
"""

# segment_anything declares no attribute types, so to a type checker each of its weights is "Tensor | Module".
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.nn import functional as F

from weaksam.sam.image_side import ImageSide, upscaling_matrix
from weaksam.sam.passes import Decoded


def predict_mask_logits(sam: Sam, image: ImageSide, decoded: Decoded, chosen: Tensor, *, tokens_at_once: int) -> Tensor:
    """Returns mask logits of chosen prompts, without the rows and columns that only hold padding.

    Args:
        chosen: (K,) int64 indices of prompts.
        tokens_at_once: image tokens upscaled at a time.

    Returns:
        (K, S, 4 rows, 4 columns) float32.
    """
    prompt_side, upscaling = decoded.prompt_side, MaskUpscaling(sam.mask_decoder.output_upscaling, image)
    rows, columns = image.grid_hw
    num_masks, num_tokens = decoded.hyper.shape[1], rows * columns
    logits = prompt_side.basis.new_empty(len(chosen), num_masks, 16 * num_tokens)
    for first in range(0, len(chosen), step := max(1, tokens_at_once // num_tokens)):
        batch = chosen[first : first + step]
        basis, key_scale = upscaling.inside(prompt_side.basis[batch]), upscaling.inside(prompt_side.key_scale[batch])
        update, hyper = decoded.update[batch] @ upscaling.first, decoded.hyper[batch]
        for start in range(0, num_tokens, tokens_at_once):
            part = slice(start, start + tokens_at_once)
            x = (key_scale[..., part].mT * image.upscaled[part]).baddbmm_(basis[..., part].mT, update)
            upscaled = upscaling.upscale(x.flatten(0, 1)).unflatten(0, (len(batch), -1))
            logits[first : first + step, :, 16 * part.start : 16 * part.stop] = hyper @ upscaled.mT
    # A pixel is token row, sub-row, sub-sub-row by the same of columns.
    logits = logits.view(-1, num_masks, rows, columns, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
    return logits.reshape(-1, num_masks, 4 * rows, 4 * columns)


class MaskUpscaling:
    """SAM's upscaling of image tokens to mask features, as matrix products."""

    def __init__(self, upscaling: nn.Sequential, image: ImageSide) -> None:
        first, self.norm, _, second, _ = upscaling
        self.image = image
        self.first = upscaling_matrix(first)
        self.second, self.second_bias = upscaling_matrix(second), second.bias.repeat(4)

    def inside(self, x: Tensor) -> Tensor:
        """Selects the image tokens inside the unpadded image: (B, rows, N) to (B, rows, n)."""
        rows, columns = self.image.grid_hw
        return x.unflatten(2, self.image.embedding_hw)[..., :rows, :columns].flatten(2)

    def upscale(self, x: Tensor) -> Tensor:
        """(tokens, 4 u) from the first transposed convolution, without bias, to (16 tokens, c). Changes `x`."""
        x += self.image.upscaled_bias
        norm = self.norm
        x = F.layer_norm(x.unflatten(1, (4, -1)).flatten(0, 1), norm.weight.shape, norm.weight, norm.bias, norm.eps)
        x = torch.addmm(self.second_bias, torch.ops.aten.gelu_(x), self.second)
        return torch.ops.aten.gelu_(x).unflatten(1, (4, -1)).flatten(0, 1)
