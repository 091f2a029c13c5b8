"""Descriptions of backbones for settings, stages and the catalogue. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from weaksam.models.backbones.pyramids import Pyramid
    from weaksam.models.backbones.roi_net import Pixels, RoiNet


class CropFeatures(Protocol):
    """A frozen network on crops: an `nn.Module` with these attributes.

    Attributes:
        mean, std: normalisation of pixels of 0..255.
        crop_channels, crop_strides: D and stride of each map, fine to coarse.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def crop_channels(self) -> tuple[int, ...]: ...

    @property
    def crop_strides(self) -> tuple[int, ...]: ...

    def at_once(self, device: torch.device) -> int:
        """Returns the fastest batch size of crops."""
        ...

    def crop_maps(self, crops: Tensor) -> list[Tensor]:
        """Returns the maps (B, D, h, w) of normalised crops (B, 3, side, side)."""
        ...

    def load_pretrained(self) -> None:
        """Loads the published weights."""
        ...


@dataclass(frozen=True)
class BackboneKind:
    """A backbone of the catalogue. Functions import torch only when called; None: the backbone has no such form.

    Attributes:
        name: value of `backbone` in a run file.
        title: its name in reports.
        roi_net: builds the network, with random weights, that pools RoIs from maps of the whole image, for OICR and
            MIST, from `pixels`, `last_relu` and `frozen_stages` of `WsodSpec`.
        imagenet: returns the published ImageNet weights of `roi_net` and their URL.
        crops: builds the frozen network on crops of a side in pixels, for OICR and MIST.
        crops_key: name of that network in checkpoints.
        crop_multiple: the side of a crop must be a multiple of this, pixels.
        takes_weights: whether `weights`, a file of the whole network, may replace the published weights.
        is_rounded: whether remembered maps of crops are in half precision, so that many fit in memory.
        pyramid: builds the maps of detectors, with random weights, from `frozen_stages` and `finest`, see
            `make_pyramid`.
        is_pyramid_frozen: whether no stage of the pyramid is trained, so that its maps can be remembered.
        classifier: builds a classifier of a number of classes, if it is not WeakTr.
        mean, std: normalisation of the pixels of that classifier, of 0..255.
        weaktr_size: returns the size of WeakTr on this backbone; other backbones of WeakTr are ViTs of timm.
        shipped: returns the identities of the weights that come with weaksam, which enter fingerprints.
        wsod_recipe, classifier_recipe: settings of `train_wsod` and `train_classifier` that differ from those stages'
            defaults.
    """

    name: str
    title: str
    roi_net: Callable[[Pixels, bool, int], RoiNet] | None = None
    imagenet: Callable[[], tuple[Mapping[str, Tensor], str]] | None = None
    crops: Callable[[int], Any] | None = None
    crops_key: str = ""
    crop_multiple: int = 16
    is_rounded: bool = False
    takes_weights: bool = False
    pyramid: Callable[[int, int], Pyramid] | None = None
    is_pyramid_frozen: bool = False
    classifier: Callable[[int], Any] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    weaktr_size: Callable[[], Any] | None = None
    shipped: Callable[[], Mapping[str, str]] = dict
    wsod_recipe: Mapping[str, Any] = field(default_factory=dict)
    classifier_recipe: Mapping[str, Any] = field(default_factory=dict)


# Two layers on frozen features learn from few images in minutes; a single size of view, so that features are cached.
FROZEN_WSOD_RECIPE: dict[str, Any] = {
    "dropblock": "off",
    "optimizer": "muon",
    "weight_decay": 0.1,
    "warmup": 40,
    "milestones": None,
    "clip": 5.0,
    "ema": 0.98,
}
# For a single frozen network that was trained on photographs.
PHOTOGRAPHS_WSOD_RECIPE = FROZEN_WSOD_RECIPE | {
    "scales": [384],
    "min_side": 16,
    "rating_power": 8,
    "steps": 300,
    "crop": 96,
    "lr": 1e-3,
}
# The only augmentation is the mirror image, so that the features of an image can be cached.
PHOTOGRAPHS_CLASSIFIER_RECIPE: dict[str, Any] = {
    "image_size": 320,
    "epochs": 15,
    "batch_size": 8,
    "lr": 3e-3,
    "final_lr": 0.0,
    "warmup_epochs": 1,
    "weight_decay": 0.05,
    "drop_path": 0.0,
    "min_scale": 1.0,
    "rand_augment": 0.0,
    "erase": 0.0,
}
