"""The restated mask decoder against the one of `segment_anything`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam

from tests.sam.tiny import IMAGE_SIDE, build_tiny_sam, shake
from weaksam.sam.decoder import decode_prompts
from weaksam.sam.image_side import make_image_side
from weaksam.sam.mask_head import predict_mask_logits
from weaksam.sam.prompts import embed_boxes, embed_points

GRID = 16


def reference(sam: Sam, embedding: torch.Tensor, points, boxes, multimask: bool):
    """Mask logits and predicted IoU of the original decoder."""
    sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=None)
    return sam.mask_decoder(embedding[None], sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask)


def ours(sam: Sam, embedding: torch.Tensor, tokens: torch.Tensor, slots, grid_hw=(GRID, GRID), tokens_at_once=100):
    """The same from the restated decoder."""
    side = make_image_side(sam, embedding, grid_hw)
    decoded = decode_prompts(sam, side, tokens, slots)
    chosen = torch.arange(len(tokens))
    return predict_mask_logits(sam, side, decoded, chosen, tokens_at_once=tokens_at_once), decoded.predicted_iou


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to rounding: 1e-5 of the spread of the values."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(params=[(32, 4), (48, 2), (24, 3)], ids=lambda p: f"{p[0]}channels-{p[1]}heads")
def sam(request) -> Sam:
    channels, heads = request.param
    return shake(build_tiny_sam(seed=1, channels=channels, heads=heads))


@pytest.fixture
def embedding(sam: Sam) -> torch.Tensor:
    return torch.randn(sam.mask_decoder.transformer_dim, GRID, GRID, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("num_points", [1, 2, 5])
def test_points_give_the_reference_masks(sam, embedding, num_points):
    points = np.random.default_rng(0).uniform(0, IMAGE_SIDE, (4, num_points, 2))
    given = (torch.from_numpy(points), torch.ones(4, num_points))
    masks, iou = reference(sam, embedding, given, None, True)
    found_masks, found_iou = ours(sam, embedding, embed_points(sam.prompt_encoder, points), (1, 2, 3))
    assert_close(found_masks, masks)
    assert_close(found_iou, iou)


@pytest.mark.parametrize("multimask", [False, True])
def test_boxes_give_the_reference_masks(sam, embedding, multimask):
    corners = np.random.default_rng(0).uniform(0, IMAGE_SIDE, (3, 2, 2))
    masks, iou = reference(sam, embedding, None, torch.from_numpy(corners.reshape(3, 4)), multimask)
    slots = (1, 2, 3) if multimask else (0,)
    found_masks, found_iou = ours(sam, embedding, embed_boxes(sam.prompt_encoder, corners), slots)
    assert_close(found_masks, masks)
    assert_close(found_iou, iou)


def test_only_tokens_inside_the_image_are_drawn(sam, embedding):
    tokens = embed_points(sam.prompt_encoder, np.full((1, 1, 2), 40.0))
    whole, _ = ours(sam, embedding, tokens, (1, 3))
    part, _ = ours(sam, embedding, tokens, (1, 3), grid_hw=(5, 9))
    assert part.shape == (1, 2, 20, 36)
    assert_close(part, whole[:, :, :20, :36])


def test_rounding_is_no_worse_than_the_references():
    sam = shake(build_tiny_sam(seed=3))
    embedding = torch.randn(32, GRID, GRID, generator=torch.Generator().manual_seed(4))
    points = np.random.default_rng(1).uniform(0, IMAGE_SIDE, (6, 1, 2))
    tokens = embed_points(sam.prompt_encoder, points)
    mine, _ = ours(sam, embedding, tokens, (1, 2, 3))
    theirs, _ = reference(sam, embedding, (torch.from_numpy(points), torch.ones(6, 1)), None, True)
    pe = sam.prompt_encoder.get_dense_pe().double()
    dense = sam.prompt_encoder.no_mask_embed.weight.double().view(1, -1, 1, 1).expand(6, -1, GRID, GRID)
    exact, _ = sam.mask_decoder.double()(embedding[None].double(), pe, tokens.double(), dense, True)
    assert (mine - exact).abs().max() <= 3 * (theirs - exact).abs().max()


def test_no_prompt_chosen_draws_nothing(sam, embedding):
    side = make_image_side(sam, embedding, (GRID, GRID))
    tokens = embed_points(sam.prompt_encoder, np.full((2, 1, 2), 40.0))
    decoded = decode_prompts(sam, side, tokens, (1, 2))
    nothing = torch.zeros(0, dtype=torch.int64)
    assert predict_mask_logits(sam, side, decoded, nothing, tokens_at_once=8).shape == (0, 2, 64, 64)
