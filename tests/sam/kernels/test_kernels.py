"""Each kernel against its twin in plain PyTorch; in float32, which the engine does not ask of them, they are exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam

from testing.calibrate import calibrate, noise_image
from tests.sam.kernels.conftest import HALVES
from tests.sam.test_postprocess import cut, make
from tests.sam.tiny import IMAGE_SIDE, build_tiny_sam, shake
from weaksam.ops.rle import decode_rle
from weaksam.sam import attention
from weaksam.sam.backend import PLAIN, Backend
from weaksam.sam.decoder import decode_prompts
from weaksam.sam.engine import EngineSettings, Proposals, SamEngine
from weaksam.sam.image_side import ImageSide, make_image_side
from weaksam.sam.kernels import make_backend
from weaksam.sam.passes import Decoded
from weaksam.sam.prompts import embed_points

GRID = 16
SHAPES = [(32, 4, 1), (48, 2, 1), (24, 3, 4)]  # channels, heads, points of a prompt: heads and rows need padding


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Within a share of the largest value."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def tolerance_of(dtype: torch.dtype) -> float:
    """What rounding to a type may move results by, as a share of the largest."""
    return 8 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("height", "width", "dim"), [(8, 8, 16), (14, 14, 80), (6, 5, 24), (3, 40, 64)])
def test_attention(device, dtype, height, width, dim):
    from weaksam.sam.kernels.attention import attend

    generator = torch.Generator().manual_seed(0)
    num_tokens = height * width
    query, key, value = torch.randn(3, 3, num_tokens, dim, generator=generator).to(device).unbind()
    rel_h = torch.randn(3, num_tokens, height, generator=generator).to(device)
    rel_w = torch.randn(3, num_tokens, width, generator=generator).to(device)
    halves = [x.to(dtype) for x in (query, key, value, rel_h, rel_w)]
    expected = attention.attend(*(x.float() for x in halves))
    assert_near(attend(*halves), expected.to(dtype), tolerance_of(dtype))


def decode_with(
    device: torch.device, backend: Backend, shape: tuple[int, int, int], grid_hw: tuple[int, int] = (GRID, GRID)
) -> tuple[Sam, ImageSide, Decoded]:
    """Three prompts on random image tokens."""
    channels, heads, num_points = shape
    sam = shake(build_tiny_sam(seed=1, channels=channels, heads=heads)).to(device)
    embedding = torch.randn(channels, GRID, GRID, generator=torch.Generator().manual_seed(2)).to(device)
    side = make_image_side(sam, embedding, grid_hw)
    points = np.random.default_rng(0).uniform(0, IMAGE_SIDE, (3, num_points, 2))
    tokens = embed_points(sam.prompt_encoder, points)
    return sam, side, decode_prompts(sam, side, tokens, (1, 2, 3), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_passes_of_the_decoder(device, dtype, shape):
    _, _, found = decode_with(device, make_backend(dtype), shape)
    _, _, expected = decode_with(device, PLAIN, shape)
    assert_near(found.predicted_iou, expected.predicted_iou, tolerance_of(dtype))
    assert_near(found.hyper, expected.hyper, tolerance_of(dtype))
    assert_near(found.update, expected.update, tolerance_of(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_inner_products_beyond_half_precision_do_no_harm(device, dtype):
    def decode(backend: Backend) -> Decoded:
        sam = shake(build_tiny_sam(seed=1)).to(device)
        for layer in sam.mask_decoder.transformer.layers:
            layer.cross_attn_image_to_token.out_proj.weight.mul_(2000)
        embedding = torch.randn(32, GRID, GRID, generator=torch.Generator().manual_seed(2)).to(device)
        tokens = embed_points(sam.prompt_encoder, np.full((1, 1, 2), 40.0))
        side = make_image_side(sam, embedding, (GRID, GRID))
        return decode_prompts(sam, side, tokens, (1, 2), backend=backend)

    found, expected = decode(make_backend(dtype)), decode(PLAIN)
    assert expected.update.square().sum(2).max() > 65504  # of float16
    assert_near(found.hyper, expected.hyper, 4 * tolerance_of(dtype))
    assert_near(found.predicted_iou, expected.predicted_iou, 4 * tolerance_of(dtype))


def test_the_passes_need_the_variances(device):
    """The comparison above can fail: a wrong inner product shows, although norms hide most of it."""
    kernels = make_backend(torch.float32)

    def wrong(image, image_to_token, token_to_image):
        return kernels.first_pass(image, replace(image_to_token, gram=0.9 * image_to_token.gram), token_to_image)

    _, _, found = decode_with(device, replace(kernels, first_pass=wrong), SHAPES[0])
    _, _, expected = decode_with(device, PLAIN, SHAPES[0])
    assert (found.hyper - expected.hyper).abs().max() > 1e-5 * expected.hyper.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("grid_hw", [(GRID, GRID), (5, 11)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_predict_mask_logits(device, dtype, shape, grid_hw):
    chosen = torch.tensor([2, 0], device=device)
    kernels = make_backend(dtype)
    sam, side, found = decode_with(device, kernels, shape, grid_hw)
    found = kernels.predict_mask_logits(sam, side, found, chosen, tokens_at_once=1)
    sam, side, expected = decode_with(device, PLAIN, shape, grid_hw)
    expected = PLAIN.predict_mask_logits(sam, side, expected, chosen, tokens_at_once=100)
    assert_near(found, expected, tolerance_of(dtype))


def test_nothing_to_draw(device):
    kernels = make_backend(torch.float16)
    sam, side, decoded = decode_with(device, kernels, SHAPES[0])
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    assert kernels.predict_mask_logits(sam, side, decoded, nothing, tokens_at_once=1).shape == (0, 3, 64, 64)


@pytest.mark.parametrize("image_hw", [(90, 120), (128, 128), (1, 1), (1, 300), (300, 2), (37, 21), (333, 250)], ids=str)
def test_measuring(device, image_hw):
    from weaksam.sam.kernels.postprocess import measure_masks

    frame, logits = make(image_hw, num_masks=3)
    logits = cut(frame, torch.cat([logits, torch.full_like(logits[:1], -3.0), torch.full_like(logits[:1], 3.0)]))
    logits[0, 20:, :] = logits[1, :, 20:] = -9.0  # masks in a corner
    expected = PLAIN.measure_masks(frame.upsampler(torch.device("cpu")), logits, offset=1.0, budget=2**18)
    found = measure_masks(frame.upsampler(device), logits.to(device), offset=1.0, budget=0)
    torch.testing.assert_close(found.boxes.cpu(), expected.boxes, rtol=0, atol=0)
    torch.testing.assert_close(found.stability.cpu(), expected.stability, rtol=0, atol=1e-4, equal_nan=True)


def test_no_masks_to_measure(device):
    from weaksam.sam.kernels.postprocess import measure_masks

    frame, logits = make((40, 50))
    assert measure_masks(frame.upsampler(device), logits[:0].to(device), offset=1.0, budget=0).boxes.shape == (0, 4)


@pytest.fixture(scope="module")
def sam(device) -> Sam:
    return calibrate(shake(build_tiny_sam()).to(device), noise_image(90, 120))


def propose(sam: Sam, image: np.ndarray, precision: str) -> Proposals:
    engine = SamEngine(sam, settings=EngineSettings(4, precision=precision))
    (found,) = engine.propose(
        [image], pred_iou_threshold=0.88, stability_threshold=0.6, nms_threshold=1.0, return_masks=True
    )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_engine_gives_the_same_masks_with_kernels(device, sam, precision, monkeypatch):
    image = noise_image(90, 120, seed=1)
    monkeypatch.setattr("weaksam.sam.kernels.usable", lambda _: False)
    expected = propose(sam, image, "fp32")
    monkeypatch.setattr("weaksam.sam.kernels.usable", lambda _: True)
    found = propose(sam, image, precision)
    masks, theirs = ([decode_rle(m, 90, 120) for m in one.masks] for one in (found, expected))
    assert len(theirs) >= 8
    best = [max(np.sum(m & other) / np.sum(m | other) for other in masks) for m in theirs]
    assert np.mean(np.array(best) >= (0.9 if precision == "fp16" else 0.999)) >= 0.98
    assert abs(len(masks) - len(theirs)) <= (2 if precision == "fp16" else 0)
