"""Weights of SAM: the small model in the package, the official files, or a file in the same form.

A file is checked before it is used: size and hash where known, then every key and shape. A cut download or the weights
of another variant therefore raise an error and never give wrong masks.
"""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from segment_anything.modeling import Sam
from torch import Tensor

from weaksam.errors import WeightsError
from weaksam.sam.build import build_sam
from weaksam.sam.inputs import check_device
from weaksam.sam.shipped import SHIPPED
from weaksam.sam.variants import VARIANTS

# https://github.com/facebookresearch/segment-anything: name and bytes. The name ends with the start of the SHA-256.
OFFICIAL = {
    "vit_h": ("sam_vit_h_4b8939.pth", 2564550879),
    "vit_l": ("sam_vit_l_0b3195.pth", 1249524607),
    "vit_b": ("sam_vit_b_01ec64.pth", 375042383),
}
_OFFICIAL_NAME = re.compile(r"sam_(vit_[hlb])_([0-9a-f]{6})\.pth")
_NAMED = 5  # keys named in a message; the rest are counted
# Exceptions of the loaders for a file that holds no weights.
_UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    OSError,
)


def load_sam(
    model: str, checkpoint: str | Path | None = None, *, sha256: str | None = None, device: str | torch.device = "cpu"
) -> Sam:
    """Returns a SAM with its weights, float32, in eval mode, without gradients.

    Args:
        model: a key of `variants.VARIANTS`.
        checkpoint: local file, `.safetensors` or a state dict from `torch.save`. None takes the weights in the
            package, which only vit_xs has.
        sha256: hash the file must have, 64 hex digits.

    Raises:
        WeightsError: the file is missing, cut, altered, or does not fit the model.
        ConfigError: no such model.
        ValueError: the engine does not run on such a device.
    """
    check_device(device)
    sam = build_sam(model)
    path = Path(checkpoint) if checkpoint is not None else _bundled(model)
    check_file(path, model, sha256=sha256)
    state = read_state(path)
    _check_fit(path, state, sam, model)
    sam.load_state_dict(state)
    return sam.to(device).eval().requires_grad_(False)


def check_file(path: Path, model: str, *, sha256: str | None = None) -> None:
    """Raises WeightsError when a weights file is missing or does not match its name or `sha256`.

    Official names promise a variant, a size and the start of the hash.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file, it should hold the weights of {model}: give its path or download it")
    expected = sha256.lower() if sha256 else ""
    named = _OFFICIAL_NAME.fullmatch(path.name)
    if named:
        variant, prefix = named.groups()
        if variant != model:
            raise WeightsError(f"{path}: weights of {variant} by its name, the model is {model}: change one of them")
        official_name, size = OFFICIAL[variant]
        num_bytes = path.stat().st_size
        if path.name == official_name and num_bytes != size:
            raise WeightsError(f"{path}: {num_bytes} bytes, the official file has {size}: download it again")
        expected = expected or prefix
    if expected:
        digest = file_sha256(path)
        if not digest.startswith(expected):
            raise WeightsError(
                f"{path}: SHA-256 {digest}, expected {expected}: the file was altered, download it again"
            )


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bundled(model: str) -> Path:
    if model not in SHIPPED:
        official_name, _ = OFFICIAL[model]
        raise WeightsError(f"{model} has no weights in the package: download {official_name} and give its path")
    return SHIPPED[model]


def read_state(path: Path, *, wrappers: Sequence[str] = ()) -> dict[str, Tensor]:
    """Reads the state dict of a file to the CPU; no code in the file is run.

    Args:
        path: `.safetensors`, or a file from `torch.save`.
        wrappers: keys under which training scripts may store the state dict beside other entries.

    Raises:
        WeightsError: there is no such file, it is cut off, or it holds no state dict.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file: give the path of a weights file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        size = path.stat().st_size
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{path}: cannot be read as weights ({reason}). It has {size} bytes: a download that stopped early, or "
            "another kind of file. Download it again"
        ) from error
    for wrapper in wrappers:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: holds {type(state).__name__}, not a dict of tensors: save the model's state dict")
    return state


def _check_fit(path: Path, state: dict[str, Tensor], sam: Sam, model: str) -> None:
    """Raises WeightsError unless `state` has exactly the keys and shapes of `sam`."""
    expected = sam.state_dict()
    faults = []
    if missing := [key for key in expected if key not in state]:
        faults.append(f"missing {_first_names(missing)}")
    if unexpected := [key for key in state if key not in expected]:
        faults.append(f"unexpected {_first_names(unexpected)}")
    misshaped = [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if misshaped:
        faults.append(_first_names(misshaped))
    if faults:
        fits = _variant_of(state)
        advice = f"it looks like {fits}: set the model to that" if fits and fits != model else "give weights of SAM"
        raise WeightsError(f"{path}: does not fit {model}: {'; '.join(faults)}; {advice}")


def _first_names(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _variant_of(state: dict[str, Tensor]) -> str | None:
    """Returns the variant of a state dict, by the width of its image encoder."""
    position = state.get("image_encoder.pos_embed")
    if position is None or position.ndim != 4:
        return None
    widths = {size.encoder_dim: name for name, size in VARIANTS.items()}
    return widths.get(position.shape[3])
