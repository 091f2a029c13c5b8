"""Triton kernels of the engine on a GPU.

Each kernel computes the same as a plain PyTorch function in `weaksam.sam`, its twin, and is tested against it: in
Triton's interpreter everywhere, and on the device where there is a GPU. Without Triton or a GPU the twins are used.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial

import torch

from weaksam.sam.backend import PLAIN, Backend

HALF = (torch.float16, torch.bfloat16)
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def usable(device: torch.device) -> bool:
    """Returns whether kernels can run on a device."""
    return device.type == "cuda" and _HAS_TRITON


def choose_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """Returns the backend of the decoder; in float32 only the kernel that multiplies no matrices is used."""
    if not usable(device):
        return PLAIN
    kernels = make_backend(dtype)
    return kernels if dtype in HALF else replace(PLAIN, measure_masks=kernels.measure_masks)


def make_backend(dtype: torch.dtype) -> Backend:
    """Returns a backend of all kernels; inputs of products are rounded to `dtype`."""
    from weaksam.sam.kernels import mask_head, passes, postprocess

    return Backend(
        read_unchanged=partial(passes.read_unchanged, dtype=dtype),
        first_pass=partial(passes.first_pass, dtype=dtype),
        second_pass=partial(passes.second_pass, dtype=dtype),
        predict_mask_logits=mask_head.predict_mask_logits,
        measure_masks=postprocess.measure_masks,
        is_memory_lean=True,
    )
