"""SAM as a batch engine: encode an image once, decode thousands of prompts, keep few.

In: RGB images and prompts. Out: proposals (boxes with scores, masks on request) or the masks of boxes. The same masks
as `segment_anything`'s SamAutomaticMaskGenerator and SamPredictor up to floating-point rounding. What is saved: work
that all prompts of an image share is done once (`decoder`), masks are drawn only for prompts whose predicted IoU
passes, full-size pixels exist only in strips (`postprocess`), run lengths are made only for what survives suppression.

Axis legend: B prompts, S mask slots, K candidate masks, N proposals.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from weaksam.errors import ImageError
from weaksam.ops.suppression import nms_of_mask_boxes
from weaksam.sam.candidates import Candidates, Drawn, Filter
from weaksam.sam.decoder import decode_prompts, draw_masks
from weaksam.sam.frame import Frame, make_frame, resize_image
from weaksam.sam.image_side import ImageSide, make_image_side
from weaksam.sam.postprocess import encode_masks, measure_masks, pixel_budget
from weaksam.sam.prompts import Prompts, embed_prompts, grid_points
from weaksam.sam.upsample import Upsampler

logger = logging.getLogger(__name__)

SINGLE_MASK = (0,)
AMBIGUOUS_MASKS = (1, 2, 3)
_T = TypeVar("_T")

# On a CPU, prompts times image tokens decoded at a time, and image tokens upscaled at a time, stay in the caches.
_CPU_CHUNK_TOKENS = 2**15
_CPU_DRAW_TOKENS = 2**10
_DEVICE_DRAW_TOKENS = 2**20
_DEVICE_CHUNK = 128


@dataclass(frozen=True)
class EngineSettings:
    """How much is computed at a time. Changes speed and memory, never results beyond rounding.

    Attributes:
        points_per_side: of the grid that is used when no prompts are given.
        points_per_chunk: prompts decoded at a time; None chooses by device and model size.
        pixels_at_once: full-size pixels computed at a time; None chooses by device.
    """

    points_per_side: int = 32
    points_per_chunk: int | None = None
    pixels_at_once: int | None = None


@dataclass(frozen=True)
class EncodedImage:
    """An image after the encoder, ready for any number of prompts.

    Attributes:
        frame: its sizes.
        side: what its prompts share in the decoder.
        upsampler: from mask logits to its pixels.
    """

    frame: Frame
    side: ImageSide
    upsampler: Upsampler


@dataclass(frozen=True)
class Proposals:
    """Proposals of one image, best predicted IoU first.

    Attributes:
        boxes: (N, 4) float32 xyxy pixels, right and bottom exclusive.
        predicted_iou: (N,) float32.
        stability: (N,) float32; NaN only when nothing is asked of it.
        source: (N,) uint8 of the prompt that gave the proposal.
        masks: N COCO compressed counts, or None when not asked for.
    """

    boxes: np.ndarray
    predicted_iou: np.ndarray
    stability: np.ndarray
    source: np.ndarray
    masks: list[bytes] | None


@dataclass(frozen=True)
class BoxMasks:
    """Masks of boxes.

    Attributes:
        masks: per box and slot, COCO compressed counts.
        predicted_iou: (boxes, slots) float32.
    """

    masks: list[list[bytes]]
    predicted_iou: np.ndarray


class SamEngine:
    """Proposals and masks of a SAM model, for images one after the other.

    Args:
        sam: the model, in eval mode; its device is the engine's.
        settings: amounts of work at a time.

    Attributes:
        encoder_calls, prompts_decoded: images encoded and prompts decoded so far.
        oom_backoffs: how often the device ran out of memory.
        points_per_chunk: prompts decoded at a time; halves when the device runs out of memory, and stays so.
    """

    def __init__(self, sam: Sam, *, settings: EngineSettings = EngineSettings()) -> None:
        self.sam = sam
        self.settings = settings
        self.encoder_calls = self.prompts_decoded = self.oom_backoffs = 0
        self.points_per_chunk = settings.points_per_chunk or default_chunk(sam)
        self._tokens = _CPU_DRAW_TOKENS if sam.device.type == "cpu" else _DEVICE_DRAW_TOKENS
        self._pixels = settings.pixels_at_once or pixel_budget(sam.device)

    @torch.inference_mode()
    def encode(self, image: np.ndarray) -> EncodedImage:
        """One image through the encoder.

        Args:
            image: (H, W, 3) uint8 RGB.

        Raises:
            ValueError: `image` has another shape or dtype.
            ImageError: `oom`, the device has no memory for one image.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
            raise ValueError(f"image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
        frame = make_frame(self.sam, image.shape[:2])
        pixels = resize_image(image, *frame.input_hw).to(self.sam.device)
        try:
            self.encoder_calls += 1
            embedding = self.sam.image_encoder(self.sam.preprocess(pixels)[None])[0]
            side = make_image_side(self.sam, embedding, frame.grid_hw)
        except torch.OutOfMemoryError as error:
            raise ImageError("oom", f"no device memory to encode {frame.image_hw} pixels: {error}") from error
        return EncodedImage(frame=frame, side=side, upsampler=frame.upsampler(self.sam.device))

    @torch.inference_mode()
    def propose(
        self,
        images: Sequence[np.ndarray | EncodedImage],
        prompts: Sequence[Prompts] | None = None,
        *,
        pred_iou_threshold: float,
        stability_threshold: float,
        nms_threshold: float | None,
        stability_offset: float = 1.0,
        keep_masks: Collection[int] = (0, 1, 2),
        max_proposals: int | None = None,
        return_masks: bool = False,
    ) -> list[Proposals]:
        """Proposals of images: prompt, filter, suppress.

        A threshold of 0 or less filters nothing, as in `segment_anything`. Empty masks never become proposals.

        Args:
            images: (H, W, 3) uint8 RGB, or images from `encode` to prompt them again without encoding.
            prompts: per image; None prompts every image with the grid of the settings.
            pred_iou_threshold: masks need a predicted IoU above this.
            stability_threshold: masks need at least this stability.
            nms_threshold: box IoU above which the worse mask goes; None keeps all, in the order of the prompts.
            stability_offset: stability compares the masks cut at this logit above and below 0.
            keep_masks: which of SAM's three masks per prompt to use: 0, 1, 2.
            max_proposals: keep at most so many, the first ones; None keeps all.
            return_masks: also give masks.

        Raises:
            ImageError: `oom`, not even one prompt at a time fits the device.
        """
        if prompts is not None and len(prompts) != len(images):
            raise ValueError(f"prompts are for {len(prompts)} images, images are {len(images)}")
        if not set(keep_masks) <= {0, 1, 2} or not keep_masks:
            raise ValueError(f"keep_masks must be some of 0, 1, 2, got {sorted(keep_masks)}")
        slots = tuple(AMBIGUOUS_MASKS[i] for i in sorted(keep_masks))
        wanted = Filter(pred_iou_threshold, stability_threshold, stability_offset, slots)
        results = []
        for index, image in enumerate(images):
            encoded = image if isinstance(image, EncodedImage) else self.encode(image)
            asked = self._grid(encoded) if prompts is None else prompts[index]
            found = self._candidates(encoded, asked, wanted, with_logits=return_masks)
            if nms_threshold is not None:
                found = found.take(nms_of_mask_boxes(found.boxes, found.predicted_iou, threshold=nms_threshold))
            found = found.take(torch.arange(len(found.prompt), device=self.sam.device)[:max_proposals])
            masks = encode_masks(encoded.upsampler, found.logits, budget=self._pixels) if return_masks else None
            results.append(_proposals(found, asked, masks))
        return results

    @torch.inference_mode()
    def masks_for_boxes(
        self, image: np.ndarray | EncodedImage, boxes: np.ndarray, *, multimask: bool = False
    ) -> BoxMasks:
        """Masks that SAM draws for boxes.

        Args:
            image: (H, W, 3) uint8 RGB, or an image from `encode`.
            boxes: (M, 4) float xyxy pixels.
            multimask: give SAM's three masks per box instead of its single one.
        """
        encoded = image if isinstance(image, EncodedImage) else self.encode(image)
        slots = AMBIGUOUS_MASKS if multimask else SINGLE_MASK
        wanted = Filter(0.0, 0.0, 1.0, slots)
        scores, masks = [np.zeros((0, len(slots)), dtype=np.float32)], []
        prompts = Prompts(boxes=boxes)
        for drawn in self._in_chunks(encoded, prompts, lambda tokens, _: self._decode(encoded, tokens, wanted)):
            scores.append(drawn.predicted_iou.view(-1, len(slots)).cpu().numpy())
            masks += encode_masks(encoded.upsampler, drawn.logits, budget=self._pixels)
        per_box = [masks[i : i + len(slots)] for i in range(0, len(masks), len(slots))]
        return BoxMasks(masks=per_box, predicted_iou=np.concatenate(scores))

    @torch.inference_mode()
    def snap_boxes(self, image: np.ndarray | EncodedImage, boxes: np.ndarray) -> np.ndarray:
        """(M, 4) float32: boxes of the masks that SAM draws for boxes; where it draws none, the box as it was.

        Args:
            image: (H, W, 3) uint8 RGB, or an image from `encode`.
            boxes: (M, 4) float xyxy pixels.
        """
        encoded = image if isinstance(image, EncodedImage) else self.encode(image)
        found = self._candidates(encoded, Prompts(boxes=boxes), Filter(0.0, 0.0, 1.0, SINGLE_MASK), with_logits=False)
        snapped = boxes.astype(np.float32)
        snapped[found.prompt.cpu().numpy()] = found.boxes.cpu().numpy()
        return snapped

    def _grid(self, encoded: EncodedImage) -> Prompts:
        return Prompts(points=grid_points(*encoded.frame.image_hw, self.settings.points_per_side))

    def _candidates(self, encoded: EncodedImage, prompts: Prompts, wanted: Filter, *, with_logits: bool) -> Candidates:
        """Masks of one image that pass both thresholds, in the order of the prompts."""

        def run(tokens: Tensor, numbers: Tensor) -> Candidates:
            drawn = self._decode(encoded, tokens, wanted)
            return self._measure(encoded, drawn, numbers, wanted, with_logits=with_logits)

        none = Candidates.none(encoded.frame.low_hw, self.sam.device)
        return Candidates.join([none, *self._in_chunks(encoded, prompts, run)])

    def _decode(self, encoded: EncodedImage, tokens: Tensor, wanted: Filter) -> Drawn:
        """Decodes prompts and draws the masks whose predicted IoU passes."""
        decoded = decode_prompts(self.sam, encoded.side, tokens, wanted.slots)
        passes = torch.ones_like(decoded.predicted_iou, dtype=torch.bool)
        if wanted.predicted_iou > 0:
            passes = decoded.predicted_iou > wanted.predicted_iou
        chosen = passes.any(dim=1).nonzero().flatten()
        rows, columns = encoded.frame.low_hw
        logits = draw_masks(self.sam, encoded.side, decoded, chosen, tokens_at_once=self._tokens)
        logits = logits[passes[chosen], :rows, :columns]
        return Drawn(passes.nonzero()[:, 0], decoded.predicted_iou[passes], logits)

    def _measure(
        self, encoded: EncodedImage, drawn: Drawn, numbers: Tensor, wanted: Filter, *, with_logits: bool
    ) -> Candidates:
        """Keeps what is stable and not empty."""
        stats = measure_masks(encoded.upsampler, drawn.logits, offset=wanted.offset, budget=self._pixels)
        logits = drawn.logits if with_logits else drawn.logits[:0]
        found = Candidates(stats.boxes, stats.stability, drawn.predicted_iou, numbers[drawn.prompt], logits)
        keep = stats.boxes[:, 2] > 0
        if wanted.stability > 0:
            keep &= stats.stability >= wanted.stability
        return found.take(keep)

    def _in_chunks(self, encoded: EncodedImage, prompts: Prompts, run: Callable[[Tensor, Tensor], _T]) -> list[_T]:
        """`run` on embedded prompts and their numbers, so many at a time as the device has memory for."""
        results = []
        for numbers, tokens in embed_prompts(self.sam.prompt_encoder, encoded.frame, prompts):
            numbers, start = torch.as_tensor(numbers, device=tokens.device), 0
            while start < len(tokens):
                part = slice(start, start + self.points_per_chunk)
                shortage = None
                try:
                    results.append(run(tokens[part], numbers[part]))
                    start = part.stop
                    self.prompts_decoded += len(tokens[part])
                except torch.OutOfMemoryError as error:
                    shortage = str(error)  # not the error itself: its traceback holds tensors that are in the way
                if shortage:
                    self._halve_chunk(shortage)
        return results

    def _halve_chunk(self, shortage: str) -> None:
        if self.points_per_chunk == 1:
            raise ImageError("oom", f"no device memory to decode a single prompt: {shortage}")
        self.points_per_chunk //= 2
        self.oom_backoffs += 1
        logger.warning("out of device memory, decoding %d prompts at a time from now on", self.points_per_chunk)
        if self.sam.device.type == "cuda":
            torch.cuda.empty_cache()


def default_chunk(sam: Sam) -> int:
    """Prompts to decode at a time, by device and model size."""
    if sam.device.type != "cpu":
        return _DEVICE_CHUNK
    return max(1, _CPU_CHUNK_TOKENS // sam.prompt_encoder.image_embedding_size[0] ** 2)


def _proposals(found: Candidates, prompts: Prompts, masks: list[bytes] | None) -> Proposals:
    assert prompts.source is not None  # set in Prompts
    return Proposals(
        boxes=found.boxes.cpu().numpy(),
        predicted_iou=found.predicted_iou.cpu().numpy(),
        stability=found.stability.cpu().numpy(),
        source=prompts.source[found.prompt.cpu().numpy()].astype(np.uint8),
        masks=masks,
    )
