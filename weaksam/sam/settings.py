"""Settings of the engine: precision and batch sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from segment_anything.modeling import Sam

from weaksam.ops.checks import check_whole
from weaksam.ops.choices import check_choices

Precision = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# On a CPU, prompts times image tokens decoded at a time, and image tokens upscaled at a time, stay in the caches; so do
# pixels (2**18 floats are 1 MiB). An accelerator needs enough work to fill it.
_CPU_CHUNK_TOKENS, _CPU_UPSCALED_TOKENS, _CPU_PIXELS = 2**15, 2**10, 2**18
_DEVICE_CHUNK, _DEVICE_UPSCALED_TOKENS, _DEVICE_PIXELS, _DEVICE_IMAGES = 128, 2**17, 2**25, 4
_KERNEL_CHUNK = 1024  # kernels keep about 2 MB for a prompt of a published model, PyTorch about 8


@dataclass(frozen=True)
class EngineSettings:
    """Settings of the engine.

    Attributes:
        points_per_side: side of the default point grid, used without prompts.
        precision: "fp32" gives the masks of `segment_anything` up to rounding. "fp16" and "bf16" round the inputs of
            products of the encoder and, where there are kernels, of the decoder over image tokens; positions, prompt
            tokens, predicted IoU, norms and sums stay float32. fp16 rounds less and is for GPUs; a CPU with AMX has
            only fast bf16.
        compiled: whether PyTorch compiles the encoder, with CUDA graphs on a GPU; the first image then takes minutes.
        points_per_chunk: prompts decoded at a time; None chooses by device and model size.
        images_per_batch: images encoded at a time; None chooses by device.
        pixels_at_once: full-size pixels computed at a time; None chooses by device.

    Raises:
        ValueError: no such precision, or an amount below 1.
    """

    points_per_side: int = 32
    precision: Precision = "fp32"
    compiled: bool = False
    points_per_chunk: int | None = None
    images_per_batch: int | None = None
    pixels_at_once: int | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        check_whole("points_per_side", self.points_per_side, least=1, or_none=False)
        for name in ("points_per_chunk", "images_per_batch", "pixels_at_once"):
            check_whole(name, getattr(self, name), least=1)


@dataclass
class Amounts:
    """Batch sizes. `points` or `images` is halved when the device runs out of memory, and stays so.

    Attributes:
        points: prompts decoded.
        images: images encoded.
        upscaled_tokens: image tokens upscaled.
        pixels: full-size pixels computed.
    """

    points: int
    images: int
    upscaled_tokens: int
    pixels: int


def choose_amounts(sam: Sam, settings: EngineSettings, *, with_kernels: bool) -> Amounts:
    """Returns amounts from the settings, with defaults by device and model size."""
    if sam.device.type == "cpu":
        points = max(1, _CPU_CHUNK_TOKENS // sam.prompt_encoder.image_embedding_size[0] ** 2)
        chosen = Amounts(points, 1, _CPU_UPSCALED_TOKENS, _CPU_PIXELS)
    else:
        points = _KERNEL_CHUNK if with_kernels else _DEVICE_CHUNK
        chosen = Amounts(points, _DEVICE_IMAGES, _DEVICE_UPSCALED_TOKENS, _DEVICE_PIXELS)
    chosen.points = settings.points_per_chunk or chosen.points
    chosen.images = settings.images_per_batch or chosen.images
    chosen.pixels = settings.pixels_at_once or chosen.pixels
    return chosen
