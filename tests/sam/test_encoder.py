"""The image encoder against the one of `segment_anything`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam

from testing.calibrate import noise_image
from tests.sam.tiny import IMAGE_SIDE, build_tiny_sam
from weaksam.errors import ImageError
from weaksam.sam import attention
from weaksam.sam.encoder import FastEncoder, join, partition
from weaksam.sam.encoding import EncodedImage, ImageEncoder
from weaksam.sam.engine import EngineSettings, SamEngine
from weaksam.sam.settings import Amounts


@pytest.fixture(scope="module")
def sam() -> Sam:
    """No weight is zero, so that no term can be missed; 16 x 16 tokens in windows of 6 have padding."""
    sam = build_tiny_sam(seed=5)
    for parameter in sam.image_encoder.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return sam


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, IMAGE_SIDE, IMAGE_SIDE, generator=torch.Generator().manual_seed(0))


def test_embeddings_are_the_references(sam, pixels):
    expected = sam.image_encoder(pixels)
    found = FastEncoder(sam.image_encoder)(pixels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_padding_of_windows_is_attended_to(sam, pixels, monkeypatch):
    """The comparison above can fail: without the bias in the padding it does."""
    expected = sam.image_encoder(pixels)
    monkeypatch.setattr("weaksam.sam.encoder.partition", lambda x, window, _: partition(x, window, torch.zeros(1)))
    assert (FastEncoder(sam.image_encoder)(pixels) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_is_near_and_leaves_the_model_alone(sam, pixels, dtype, tolerance):
    expected = sam.image_encoder(pixels)
    found = FastEncoder(sam.image_encoder, dtype)(pixels)
    assert found.dtype == torch.float32
    error = ((found - expected).square().mean() / expected.square().mean()).sqrt()
    assert 1e-6 < error < tolerance
    assert {p.dtype for p in sam.parameters()} == {torch.float32}


@pytest.mark.parametrize("budget", [1, 3000, 2**20])
def test_blocks_of_scores_do_not_change_attention(budget, monkeypatch):
    monkeypatch.setattr(attention, "_CPU_SCORES", budget)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 5, 6 * 7, 8, generator=generator).unbind()
    rel_h, rel_w = torch.randn(5, 42, 6, generator=generator), torch.randn(5, 42, 7, generator=generator)
    scores = query @ key.mT / 8**0.5 + (rel_h[..., :, None] + rel_w[..., None, :]).flatten(2)
    expected = scores.softmax(-1) @ value
    torch.testing.assert_close(attention.attend(query, key, value, rel_h, rel_w), expected)
    augmented = attention.attend_augmented(query, key, value, rel_h, rel_w)
    torch.testing.assert_close(augmented, expected)


@pytest.mark.parametrize(("height", "width"), [(12, 6), (13, 5), (1, 1)])
def test_windows_come_apart_and_together(height, width):
    x = torch.randn(2, height, width, 3)
    windows = partition(x, 6, torch.full((3,), 9.0))
    assert windows.shape[1:] == (6, 6, 3)
    assert (windows == 9).sum() == windows.numel() - x.numel()
    torch.testing.assert_close(join(windows, height, width), x, rtol=0, atol=0)


def test_batches_of_mixed_sizes_are_encoded_as_alone(sam):
    images = [noise_image(40, 90), noise_image(128, 128, seed=1), noise_image(300, 200, seed=2)]
    engine = SamEngine(sam, settings=EngineSettings(5, images_per_batch=2))
    together = engine.propose(images, pred_iou_threshold=0, stability_threshold=0, nms_threshold=None)
    assert engine.encoder_calls == 3
    for image, found in zip(images, together, strict=True):
        (alone,) = SamEngine(sam, settings=EngineSettings(5)).propose(
            [image], pred_iou_threshold=0, stability_threshold=0, nms_threshold=None
        )
        np.testing.assert_array_equal(found.boxes, alone.boxes)
        np.testing.assert_allclose(found.predicted_iou, alone.predicted_iou, atol=1e-5)


def test_order_is_kept_among_images_encoded_before(sam):
    engine = SamEngine(sam, settings=EngineSettings(images_per_batch=3))
    sizes = [(40, 50), (41, 50), (42, 50), (43, 50), (44, 50)]
    images: list = [noise_image(*size) for size in sizes]
    images[1], images[4] = engine.encode(images[1]), engine.encode(images[4])
    assert [e.frame.image_hw for e in engine._encoder.in_order(images)] == sizes


def test_batches_halve_when_memory_runs_out(sam, monkeypatch):
    run, room = FastEncoder.__call__, [1]

    def short(self: FastEncoder, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, pixels)

    monkeypatch.setattr(FastEncoder, "__call__", short)
    amounts = Amounts(8, 4, 64, 1000)
    encoder = ImageEncoder(sam, EngineSettings(), amounts)
    done = encoder([noise_image(30, 40)] * 5)
    assert [type(one) for one in done] == [EncodedImage] * 5
    assert (amounts.images, encoder.backoffs, encoder.encoded) == (1, 2, 5)
    room[0] = 0
    with pytest.raises(ImageError, match=r"oom: no device memory to encode \(30, 40\) pixels"):
        encoder([noise_image(30, 40)])


def test_the_compiler_sees_the_encoder_in_one_piece(sam, pixels):
    torch._dynamo.reset()
    encoder = FastEncoder(sam.image_encoder, torch.bfloat16)
    found = torch.compile(encoder, backend="eager", fullgraph=True, dynamic=False)(pixels)
    torch.testing.assert_close(found, encoder(pixels))
