"""The encoder of a SAM on small pictures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from weaksam.models.backbones.frozen_sam import FrozenSam, cut_out
from weaksam.ops.boxes import enlarge_boxes


def test_windows_of_small_pictures_are_cut_and_not_filled_up() -> None:
    """Attention of a window is the SAM's own, less what it pays to the zeros beyond the picture."""
    whole, cut = FrozenSam("vit_xs"), FrozenSam("vit_xs", side=64)
    whole.load_pretrained()
    cut.load_pretrained()
    assert [block.window_size for block in cut.encoder.blocks] == [4, 0, 4, 0, 4, 0]
    old, new = whole.encoder.blocks[0].attn, cut.encoder.blocks[0].attn
    x = torch.randn(2, 4, 4, 160, generator=torch.Generator().manual_seed(0))
    padded = F.pad(x, (0, 0, 0, 4, 0, 4))
    q, k, v = old.qkv(padded).view(2, 64, 3, 5, 32).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * old.scale
    rows, columns = torch.arange(64) // 8, torch.arange(64) % 8
    scores += (q[..., :, None, :] * old.rel_pos_h[rows[:, None] - rows + 7]).sum(-1)
    scores += (q[..., :, None, :] * old.rel_pos_w[columns[:, None] - columns + 7]).sum(-1)
    scores[..., (rows > 3) | (columns > 3)] = -torch.inf
    wanted = old.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 8, 8, 160)[:, :4, :4])
    torch.testing.assert_close(new(x), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", [16, 64])
def test_crops_on_a_processor_are_those_of_roi_align(side: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 90, 130, generator=generator)
    corners = torch.rand(40, 2, generator=generator) * torch.tensor([150.0, 110.0]) - 15
    sizes = torch.rand(40, 2, generator=generator) ** 2 * torch.tensor([160.0, 120.0])
    boxes = torch.cat([corners, corners + sizes], 1)
    boxes[:4] = torch.tensor([[200.0, 9, 240, 20], [7, 7, 7, 7], [-60, -60, 250, 200], [0, 0, 130, 90]])
    parts = [boxes[:30], boxes[30:]]
    expected = roi_align(images, [enlarge_boxes(part, 0.2) for part in parts], (side, side), aligned=True)
    torch.testing.assert_close(cut_out(images, parts, side, 0.2), expected, atol=1e-3, rtol=0)
    assert cut_out(images, [boxes[:0], boxes[:0]], side, 0.2).shape == (0, 3, side, side)
