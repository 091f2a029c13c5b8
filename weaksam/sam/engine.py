"""SAM as a batch engine: encode an image once, decode thousands of prompts, keep few.

In: RGB images and prompts. Out: proposals (boxes with scores, masks on request) or the masks of boxes. The same masks
as `segment_anything`'s SamAutomaticMaskGenerator and SamPredictor up to floating-point rounding. Savings: work that
all prompts of an image share is done once (`decoder`), mask logits are computed only for prompts whose predicted IoU
passes, full-size pixels exist only in strips (`postprocess`), run lengths are computed only for masks that survive
suppression. The fast modes round products to half precision (`EngineSettings.precision`); on a GPU Triton kernels
replace the expensive functions (`kernels`).

Axis legend: B prompts, S mask slots, K candidate masks, N proposals.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import numpy as np
import torch
from PIL.Image import Image
from segment_anything.modeling import Sam
from torch import Tensor

from weaksam.errors import ImageError
from weaksam.ops.checks import check_number, check_whole
from weaksam.ops.suppression import nms_of_mask_boxes
from weaksam.sam.candidates import Candidates, Filter, MaskHeadOutput
from weaksam.sam.decoder import decode_prompts
from weaksam.sam.encoding import EncodedImage, ImageEncoder, Picture
from weaksam.sam.inputs import check_device
from weaksam.sam.kernels import choose_backend
from weaksam.sam.postprocess import encode_masks
from weaksam.sam.prompts import Prompts, embed_prompts, grid_points
from weaksam.sam.results import BoxMasks, Proposals
from weaksam.sam.settings import DTYPES, EngineSettings, choose_amounts

__all__ = ["BoxMasks", "EncodedImage", "EngineSettings", "Proposals", "SamEngine"]

logger = logging.getLogger(__name__)

SINGLE_MASK = (0,)
AMBIGUOUS_MASKS = (1, 2, 3)
_T = TypeVar("_T")


class SamEngine:
    """Proposals and masks of a SAM model.

    An image is an array or a tensor (H, W, 3) uint8 RGB, or a Pillow image, whose EXIF orientation is applied.
    Invalid arguments raise ValueError before any work.

    Args:
        sam: the model, in eval mode; the engine runs on its device, a CPU or an NVIDIA GPU.
        settings: precision and batch sizes.

    Attributes:
        prompts_decoded: prompts decoded so far.
        amounts: batch sizes; they halve when the device runs out of memory, and stay so.
    """

    def __init__(self, sam: Sam, *, settings: EngineSettings | None = None) -> None:
        check_device(sam.device)
        self.sam, self.settings = sam, settings or EngineSettings()
        settings = self.settings
        self.backend = choose_backend(sam.device, DTYPES[settings.precision])
        self.amounts = choose_amounts(sam, settings, with_kernels=self.backend.is_memory_lean)
        self._encoder = ImageEncoder(sam, settings, self.amounts)
        self.prompts_decoded = self._backoffs = 0

    @property
    def encoder_calls(self) -> int:
        """Images encoded so far."""
        return self._encoder.encoded

    @property
    def oom_backoffs(self) -> int:
        """Number of times the device ran out of memory so far."""
        return self._backoffs + self._encoder.backoffs

    def encode(self, image: Picture) -> EncodedImage:
        """Encodes one image.

        Raises:
            ValueError: `image` is no image, or has another shape or dtype.
            ImageError: `oom`, the device has no memory for one image.
        """
        return self._encoder([image])[0]

    @torch.inference_mode()
    def propose(
        self,
        images: Sequence[Picture | EncodedImage],
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
        """Returns proposals of images: prompts, filters, suppresses.

        A threshold of 0 or less filters nothing, as in `segment_anything`. Empty masks never become proposals.

        Args:
            images: images, or results of `encode`, to prompt them again without encoding.
            prompts: per image; None prompts every image with the grid of the settings.
            pred_iou_threshold: minimum predicted IoU of a mask, exclusive.
            stability_threshold: minimum stability of a mask.
            nms_threshold: box IoU above which the worse mask is dropped; None keeps all, in the order of the prompts.
            stability_offset: stability compares the masks cut at this logit above and below 0.
            keep_masks: which of SAM's three masks per prompt to use: 0, 1, 2.
            max_proposals: maximum number of proposals, the first are kept; None keeps all.
            return_masks: also return masks.

        Raises:
            ValueError: an argument is invalid, or an image was encoded by another SAM.
            ImageError: `oom`, not even one prompt at a time fits the device.
        """
        self._check_images(images, prompts)
        check_number("pred_iou_threshold", pred_iou_threshold)
        check_number("stability_threshold", stability_threshold)
        check_number("stability_offset", stability_offset)
        check_number("nms_threshold", nms_threshold, or_none=True)
        check_whole("max_proposals", max_proposals, least=0)
        if not set(keep_masks) <= {0, 1, 2} or not keep_masks:
            raise ValueError(f"keep_masks must be some of 0, 1, 2, got {sorted(keep_masks)}")
        slots = tuple(AMBIGUOUS_MASKS[i] for i in sorted(keep_masks))
        mask_filter = Filter(pred_iou_threshold, stability_threshold, stability_offset, slots)
        results = []
        for index, encoded in enumerate(self._encoder.in_order(images)):
            image_prompts = self._grid(encoded) if prompts is None else prompts[index]
            candidates = self._candidates(encoded, image_prompts, mask_filter, with_logits=return_masks)
            if nms_threshold is not None:
                candidates = candidates.take(
                    nms_of_mask_boxes(candidates.boxes, candidates.predicted_iou, threshold=nms_threshold)
                )
            candidates = candidates.take(torch.arange(len(candidates.prompt), device=self.sam.device)[:max_proposals])
            masks = (
                encode_masks(encoded.upsampler, candidates.logits, budget=self.amounts.pixels) if return_masks else None
            )
            results.append(_proposals(candidates, image_prompts, masks))
        return results

    @torch.inference_mode()
    def masks_for_boxes(
        self, image: Picture | EncodedImage, boxes: np.ndarray | Sequence[Sequence[float]], *, multimask: bool = False
    ) -> BoxMasks:
        """Returns the masks of SAM for boxes.

        Args:
            image: an image, or the result of `encode`.
            boxes: (M, 4) float xyxy pixels; a list is accepted.
            multimask: return SAM's three masks per box instead of its single one.
        """
        prompts = Prompts(boxes=boxes)  # pyright: ignore[reportArgumentType]
        encoded = self._encoded(image)
        slots = AMBIGUOUS_MASKS if multimask else SINGLE_MASK
        mask_filter = Filter(0.0, 0.0, 1.0, slots)
        scores, masks = [np.zeros((0, len(slots)), dtype=np.float32)], []
        for output in self._in_chunks(encoded, prompts, lambda tokens, _: self._decode(encoded, tokens, mask_filter)):
            scores.append(output.predicted_iou.view(-1, len(slots)).cpu().numpy())
            masks += encode_masks(encoded.upsampler, output.logits, budget=self.amounts.pixels)
        per_box = [masks[i : i + len(slots)] for i in range(0, len(masks), len(slots))]
        return BoxMasks(masks=per_box, predicted_iou=np.concatenate(scores))

    @torch.inference_mode()
    def snap_boxes(self, image: Picture | EncodedImage, boxes: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
        """Returns (M, 4) float32 boxes of SAM's masks for boxes; a box with an empty mask is unchanged.

        Args:
            image: an image, or the result of `encode`.
            boxes: (M, 4) float xyxy pixels; a list is accepted.
        """
        prompts = Prompts(boxes=boxes)  # pyright: ignore[reportArgumentType]
        encoded = self._encoded(image)
        candidates = self._candidates(encoded, prompts, Filter(0.0, 0.0, 1.0, SINGLE_MASK), with_logits=False)
        snapped = prompts.boxes.astype(np.float32)
        snapped[candidates.prompt.cpu().numpy()] = candidates.boxes.cpu().numpy()
        return snapped

    def _check_images(self, images: Sequence[Picture | EncodedImage], prompts: Sequence[Prompts] | None) -> None:
        if isinstance(images, (np.ndarray, Tensor, Image, EncodedImage)):
            raise ValueError("images must be a list of images, got one: give [image]")
        if isinstance(prompts, Prompts):
            raise ValueError("prompts must be a list, Prompts for each image, got one: give [prompts]")
        if prompts is not None and len(prompts) != len(images):
            raise ValueError(f"prompts are for {len(prompts)} images, images are {len(images)}")
        for image in images:
            self._encoder.check(image)
        for image_prompts in prompts or ():
            if not isinstance(image_prompts, Prompts):
                raise ValueError(
                    f"prompts must be Prompts for each image, got {type(image_prompts).__name__}: Prompts(points=...)"
                )

    def _encoded(self, image: Picture | EncodedImage) -> EncodedImage:
        self._encoder.check(image)
        return image if isinstance(image, EncodedImage) else self.encode(image)

    def _grid(self, encoded: EncodedImage) -> Prompts:
        return Prompts(points=grid_points(*encoded.frame.image_hw, self.settings.points_per_side))

    def _candidates(
        self, encoded: EncodedImage, prompts: Prompts, mask_filter: Filter, *, with_logits: bool
    ) -> Candidates:
        """Returns masks of one image that pass both thresholds, in the order of the prompts."""

        def run(tokens: Tensor, numbers: Tensor) -> Candidates:
            masks = self._decode(encoded, tokens, mask_filter)
            return self._measure(encoded, masks, numbers, mask_filter, with_logits=with_logits)

        none = Candidates.none(encoded.frame.low_hw, self.sam.device)
        return Candidates.join([none, *self._in_chunks(encoded, prompts, run)])

    def _decode(self, encoded: EncodedImage, tokens: Tensor, mask_filter: Filter) -> MaskHeadOutput:
        """Decodes prompts and computes logits of the masks whose predicted IoU passes."""
        decoded = decode_prompts(self.sam, encoded.side, tokens, mask_filter.slots, backend=self.backend)
        passes = torch.ones_like(decoded.predicted_iou, dtype=torch.bool)
        if mask_filter.predicted_iou > 0:
            passes = decoded.predicted_iou > mask_filter.predicted_iou
        chosen = passes.any(dim=1).nonzero().flatten()
        rows, columns = encoded.frame.low_hw
        logits = self.backend.predict_mask_logits(
            self.sam, encoded.side, decoded, chosen, tokens_at_once=self.amounts.upscaled_tokens
        )
        logits = logits[passes[chosen], :rows, :columns]
        return MaskHeadOutput(passes.nonzero()[:, 0], decoded.predicted_iou[passes], logits)

    def _measure(
        self, encoded: EncodedImage, masks: MaskHeadOutput, numbers: Tensor, mask_filter: Filter, *, with_logits: bool
    ) -> Candidates:
        """Keeps masks that are stable and not empty."""
        stats = self.backend.measure_masks(
            encoded.upsampler, masks.logits, offset=mask_filter.offset, budget=self.amounts.pixels
        )
        logits = masks.logits if with_logits else masks.logits[:0]
        candidates = Candidates(stats.boxes, stats.stability, masks.predicted_iou, numbers[masks.prompt], logits)
        keep = stats.boxes[:, 2] > 0
        if mask_filter.stability > 0:
            keep &= stats.stability >= mask_filter.stability
        return candidates.take(keep)

    def _in_chunks(self, encoded: EncodedImage, prompts: Prompts, run: Callable[[Tensor, Tensor], _T]) -> list[_T]:
        """Runs `run` on embedded prompts and their numbers, in chunks that fit the memory of the device."""
        results = []
        for numbers, tokens in embed_prompts(self.sam.prompt_encoder, encoded.frame, prompts):
            numbers, start = torch.as_tensor(numbers, device=tokens.device), 0
            while start < len(tokens):
                part = slice(start, start + self.amounts.points)
                shortage = None
                try:
                    results.append(run(tokens[part], numbers[part]))
                    start = part.stop
                    self.prompts_decoded += len(tokens[part])
                except torch.OutOfMemoryError as error:
                    shortage = str(error)  # not the error itself: its traceback keeps tensors alive
                if shortage:
                    self._halve_chunk(shortage)
        return results

    def _halve_chunk(self, shortage: str) -> None:
        if self.amounts.points == 1:
            raise ImageError("oom", f"no device memory to decode a single prompt: {shortage}")
        self.amounts.points //= 2
        self._backoffs += 1
        logger.warning("out of device memory, decoding %d prompts at a time from now on", self.amounts.points)
        if self.sam.device.type == "cuda":
            torch.cuda.empty_cache()


def _proposals(candidates: Candidates, prompts: Prompts, masks: list[bytes] | None) -> Proposals:
    assert prompts.source is not None  # set in Prompts
    return Proposals(
        boxes=candidates.boxes.cpu().numpy(),
        predicted_iou=candidates.predicted_iou.cpu().numpy(),
        stability=candidates.stability.cpu().numpy(),
        source=prompts.source[candidates.prompt.cpu().numpy()].astype(np.uint8),
        masks=masks,
    )
