"""Encodes images with SAM: resizes them on the CPU, uploads them as bytes and encodes them in batches.

Axis legend: B images.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL.Image import Image
from segment_anything.modeling import Sam
from torch import Tensor

from weaksam.errors import ImageError
from weaksam.sam.encoder import FastEncoder
from weaksam.sam.frame import Frame, make_frame, resize_image
from weaksam.sam.image_side import ImageSide, make_image_side
from weaksam.sam.inputs import check_image, mark_of, to_pixels
from weaksam.sam.settings import DTYPES, Amounts, EngineSettings
from weaksam.sam.upsample import Upsampler

logger = logging.getLogger(__name__)

Picture = np.ndarray | Tensor | Image  # (H, W, 3) uint8 RGB, or an image of Pillow


@dataclass(frozen=True)
class EncodedImage:
    """An image after the encoder, ready for any number of prompts.

    Attributes:
        frame: sizes of the image.
        side: data that all its prompts share in the decoder.
        upsampler: map from mask logits to pixels of the image.
        mark: identity of the SAM that encoded it, see `inputs.mark_of`; another SAM would decode noise.
    """

    frame: Frame
    side: ImageSide
    upsampler: Upsampler
    mark: str


class ImageEncoder:
    """Encodes images of any sizes, `amounts.images` at a time.

    Attributes:
        encoded: images encoded so far.
        backoffs: how often the device ran out of memory.
    """

    def __init__(self, sam: Sam, settings: EngineSettings, amounts: Amounts) -> None:
        self.sam, self.amounts, self.mark = sam, amounts, mark_of(sam)
        self.encoded = self.backoffs = 0
        self._run: Any = FastEncoder(sam.image_encoder, DTYPES[settings.precision])
        self._compiled = settings.compiled
        if settings.compiled:
            self._run = torch.compile(self._run, mode="reduce-overhead", dynamic=False)

    def check(self, image: Any) -> None:
        """Raises ValueError unless `image` is an image, or was encoded by this SAM."""
        if not isinstance(image, EncodedImage):
            check_image(image)
        elif image.mark != self.mark:
            raise ValueError("image was encoded by another SAM, or on another device: encode it with this one")

    def in_order(self, images: Sequence[Picture | EncodedImage]) -> Iterator[EncodedImage]:
        """Yields images in order, encoded where needed; a GPU gets the next batch before the last one is consumed."""
        ahead = 0 if self.sam.device.type == "cpu" else self.amounts.images
        waiting: deque[EncodedImage] = deque()
        raw: list[Picture] = []
        for image in images:
            if isinstance(image, EncodedImage):
                waiting.extend(self(raw))
                waiting.append(image)
                raw = []
            else:
                raw.append(image)
                if len(raw) >= self.amounts.images:
                    waiting.extend(self(raw))
                    raw = []
            while len(waiting) > ahead:
                yield waiting.popleft()
        waiting.extend(self(raw))
        yield from waiting

    @torch.inference_mode()
    def __call__(self, images: Sequence[Picture]) -> list[EncodedImage]:
        """Encodes images (H, W, 3) uint8 RGB of any sizes, or Pillow images.

        Raises:
            ValueError: an image has another shape or dtype.
            ImageError: `oom`, the device has no memory for one image; or the file of a Pillow image is bad.
        """
        for image in images:
            check_image(image)
        done: list[EncodedImage] = []
        while len(done) < len(images):
            batch = [to_pixels(image) for image in images[len(done) : len(done) + self.amounts.images]]
            shortage = None
            try:
                done += self._encode(batch)
            except torch.OutOfMemoryError as error:
                shortage = str(error)  # not the error itself: its traceback keeps tensors alive
            if shortage:
                self._halve(batch, shortage)
        return done

    def _encode(self, images: Sequence[np.ndarray]) -> list[EncodedImage]:
        sam, frames = self.sam, [make_frame(self.sam, image.shape[:2]) for image in images]
        side = sam.image_encoder.img_size
        # Compiled for two shapes: one image, as the stages encode, and a full batch.
        room = self.amounts.images if self._compiled and len(images) > 1 else len(images)
        pixels = torch.zeros(room, 3, side, side, device=sam.device)
        mean, std = cast(Tensor, sam.pixel_mean), cast(Tensor, sam.pixel_std)
        for padded, image, frame in zip(pixels, images, frames, strict=False):
            height, width = frame.input_hw
            padded[:, :height, :width] = (_upload(resize_image(image, height, width), sam.device) - mean) / std
        embeddings = self._run(pixels)
        self.encoded += len(images)
        return [
            EncodedImage(frame, make_image_side(sam, embedding, frame.grid_hw), frame.upsampler(sam.device), self.mark)
            for frame, embedding in zip(frames, embeddings, strict=False)
        ]

    def _halve(self, images: Sequence[np.ndarray], shortage: str) -> None:
        if len(images) == 1:
            raise ImageError("oom", f"no device memory to encode {images[0].shape[:2]} pixels: {shortage}")
        self.amounts.images = len(images) // 2
        self.backoffs += 1
        logger.warning("out of device memory, encoding %d images at a time from now on", self.amounts.images)
        if self.sam.device.type == "cuda":
            torch.cuda.empty_cache()


def _upload(x: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)  # the copy runs in the background
