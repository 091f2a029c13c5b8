"""Upsampling in one step, measuring and encoding masks, against the reference's two interpolations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything.utils.amg import batched_mask_to_box, calculate_stability_score
from segment_anything.utils.transforms import ResizeLongestSide
from torch.nn import functional as F

from tests.sam.tiny import IMAGE_SIDE, build_tiny_sam
from weaksam.ops.rle import decode_rle
from weaksam.sam.frame import Frame, make_frame, resize_image
from weaksam.sam.postprocess import encode_masks, encode_masks_together, measure_masks
from weaksam.sam.upsample import Upsampler

SIZES = [(90, 120), (375, 500), (500, 333), (128, 128), (1, 1), (1, 300), (300, 2), (37, 21), (683, 1024)]


def make(image_hw: tuple[int, int], *, num_masks: int = 6, low_side: int = 64) -> tuple[Frame, torch.Tensor]:
    """A frame of an image in a square of 4 x low_side pixels, and smooth logits."""
    side = 4 * low_side
    input_hw = ResizeLongestSide.get_preprocess_shape(*image_hw, side)
    frame = Frame(image_hw, tuple(max(1, size) for size in input_hw), side, low_side)
    noise = torch.randn(num_masks, 1, low_side // 8, low_side // 8, generator=torch.Generator().manual_seed(0))
    return frame, F.interpolate(noise, (low_side, low_side), mode="bicubic")[:, 0] * 15 - 5


def two_steps(frame: Frame, logits: torch.Tensor) -> torch.Tensor:
    """What `Sam.postprocess_masks` does."""
    padded = F.interpolate(logits[:, None], (frame.input_side,) * 2, mode="bilinear", align_corners=False)
    cut = padded[..., : frame.input_hw[0], : frame.input_hw[1]]
    return F.interpolate(cut, frame.image_hw, mode="bilinear", align_corners=False)[:, 0]


def cut(frame: Frame, logits: torch.Tensor) -> torch.Tensor:
    rows, columns = frame.low_hw
    return logits[:, :rows, :columns]


def upsampler(frame: Frame) -> Upsampler:
    return frame.upsampler(torch.device("cpu"))


def draw_masks_full(maps: Upsampler, logits: torch.Tensor, *, budget: int) -> torch.Tensor:
    """Masks cut at 0 at full size.

    Args:
        logits: (K, low rows, low columns) float32.

    Returns:
        (K, H, W) bool.
    """
    height, width = maps.rows.size, maps.columns.size
    masks = torch.zeros(len(logits), width, height, dtype=torch.bool, device=logits.device)
    for mask, row in zip(masks, logits, strict=True):
        for strip in maps.strips(row[None], maps.everything, budget):
            pixels = strip.pixels[0]
            mask[strip.column : strip.column + pixels.shape[0]] = pixels > 0
    return masks.transpose(1, 2)


@pytest.mark.parametrize("image_hw", SIZES, ids=lambda hw: f"{hw[0]}x{hw[1]}")
def test_one_step_equals_two(image_hw):
    frame, logits = make(image_hw)
    expected = two_steps(frame, logits)
    maps = upsampler(frame)
    strips = list(maps.strips(cut(frame, logits), maps.everything, budget=5000))
    found = torch.cat([strip.pixels for strip in strips], dim=1).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    masks = draw_masks_full(maps, cut(frame, logits), budget=2**18)
    assert (masks != (expected > 0)).float().mean() <= 1e-5


@pytest.mark.parametrize("image_hw", SIZES, ids=lambda hw: f"{hw[0]}x{hw[1]}")
@pytest.mark.parametrize("budget", [1, 20_000, 10**9])
def test_stats_and_run_lengths_equal_those_of_full_masks(image_hw, budget):
    frame, logits = make(image_hw)
    logits = torch.cat([logits, torch.full_like(logits[:1], -3.0), torch.full_like(logits[:1], 3.0)])
    logits[0, 20:, :] = logits[1, :, 20:] = -9.0  # masks in a corner: regions smaller than the image
    full = two_steps(frame, logits)
    found = measure_masks(upsampler(frame), cut(frame, logits), offset=1.0, budget=budget)
    expected = batched_mask_to_box(full > 0).float()
    expected[:, 2:] += (full > 0).flatten(1).any(dim=1)[:, None]
    torch.testing.assert_close(found.boxes, expected, rtol=0, atol=0)
    stability = calculate_stability_score(full, 0.0, 1.0)
    torch.testing.assert_close(found.stability, stability, rtol=0, atol=1e-4, equal_nan=True)
    masks = draw_masks_full(upsampler(frame), cut(frame, logits), budget=budget).numpy()
    rles = encode_masks(upsampler(frame), cut(frame, logits), budget=budget)
    assert encode_masks_together(upsampler(frame), cut(frame, logits)) == rles
    for rle, mask in zip(rles, masks, strict=True):
        np.testing.assert_array_equal(decode_rle(rle, *image_hw), mask)


def test_no_masks():
    frame, logits = make((40, 50))
    found = measure_masks(upsampler(frame), logits[:0], offset=1.0, budget=2**18)
    assert found.boxes.shape == (0, 4)
    assert found.stability.shape == (0,)
    assert encode_masks(upsampler(frame), logits[:0], budget=2**18) == []


def test_a_large_image_is_processed_in_strips():
    frame, logits = make((6000, 8000), num_masks=1)
    maps = upsampler(frame)
    budget = 10**6
    largest = max(strip.pixels.numel() for strip in maps.strips(cut(frame, logits), maps.everything, budget))
    assert largest <= budget
    found = measure_masks(maps, cut(frame, logits), offset=1.0, budget=budget)
    (rle,) = encode_masks(maps, cut(frame, logits), budget=budget)
    mask = decode_rle(rle, 6000, 8000)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    assert found.boxes[0].tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize(
    "image_hw", [(90, 120), (128, 60), (128, 128), (50, 51), (1, 7), (300, 200), (129, 64), (127, 3), (64, 96)]
)
def test_images_are_resized_as_by_the_reference(image_hw):
    image = np.random.default_rng(0).integers(0, 256, (*image_hw, 3), dtype=np.uint8)
    frame = make_frame(build_tiny_sam(), image_hw)
    expected = ResizeLongestSide(IMAGE_SIDE).apply_image(image)
    found = resize_image(image, *frame.input_hw)
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)


def test_a_side_never_vanishes():
    frame = make_frame(build_tiny_sam(), (1, 5000))
    assert frame.input_hw == (1, IMAGE_SIDE)
