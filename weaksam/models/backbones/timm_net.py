"""Maps of any network of timm: convolutional and hierarchical networks at several strides, plain ViTs at one.

Weights are timm's, fetched by name, or a file of the whole network; every weight that the maps depend on must be there.
Axis legend: B images, H W pixels, D channels, h w cells of a map.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weaksam.errors import ConfigError, WeightsError

_LAST_BLOCKS = 1  # of a plain ViT, whose maps are taken
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TimmInfo:
    """What timm states about a network.

    Attributes:
        strides, channels: of its maps, fine to coarse; one map of a plain ViT.
        indices: indices of these maps among timm's features.
        modules: names of the modules that make these maps.
        mean, std: normalisation of pixels of 0..255.
        license: licence of its pretrained weights; empty if timm states none.
        is_plain_vit: whether it has a single stride.
    """

    strides: tuple[int, ...]
    channels: tuple[int, ...]
    indices: tuple[int, ...]
    modules: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    license: str
    is_plain_vit: bool


@lru_cache
def timm_info(name: str) -> TimmInfo:
    """Returns what timm states about the network `name`, with or without the tag of its weights.

    Raises:
        ConfigError: timm has no such network, or cannot return maps of it.
    """
    import timm

    if not timm.is_model(name):
        raise ConfigError(f"backbone {name!r}: timm {timm.__version__} has no network of that name")
    try:
        with torch.device("meta"):
            features: Any = timm.create_model(name, features_only=True).feature_info
    except (RuntimeError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(f"backbone {name!r}: timm returns no maps of it ({error})") from error
    # of maps of one stride the last one, which has seen most
    last = {stride: place for place, stride in enumerate(features.reduction())}
    places = sorted(last.values())
    stated: Any = timm.get_pretrained_cfg(name)
    return TimmInfo(
        strides=tuple(features.reduction()[i] for i in places),
        channels=tuple(features.channels()[i] for i in places),
        indices=tuple(features.out_indices[i] for i in places),
        modules=tuple(features.module_name()[i] for i in places),
        mean=tuple(255 * value for value in stated.mean),
        std=tuple(255 * value for value in stated.std),
        license=stated.license or "",
        is_plain_vit=len(last) == 1,
    )


class TimmNet(nn.Module):
    """(B, 3, H, W) to a list of maps (B, D, h, w), fine to coarse.

    Batch norms keep their statistics. A plain ViT normalises its map. Transformers pad sides that are no multiple of
    their largest stride, at the right and bottom.

    Args:
        name: timm's name of the network.
        strides: strides of the maps to return; None: all that it has.
        frozen_maps: number of leading maps, of those that the network has, whose layers are not trained; None: all.

    Attributes:
        strides, channels: of the returned maps.
        mean, std: normalisation of pixels of 0..255.
    """

    def __init__(
        self,
        name: str,
        *,
        strides: Sequence[int] | None = None,
        frozen_maps: int | None = None,
    ) -> None:
        super().__init__()
        from timm.layers.norm_act import freeze_batch_norm_2d

        info = timm_info(name)
        self.name, self.mean, self.std = name, info.mean, info.std
        kept = [place for place, stride in enumerate(info.strides) if strides is None or stride in strides]
        if not kept:
            raise ConfigError(f"backbone {name!r}: has maps of strides {info.strides}, not of {tuple(strides or ())}")
        self.strides = tuple(info.strides[place] for place in kept)
        self.channels = tuple(info.channels[place] for place in kept)
        self.is_plain_vit = info.is_plain_vit
        self.network: Any = _build(name, [info.indices[place] for place in kept], info.is_plain_vit)
        self.is_padded = not self.is_plain_vit and not self._takes(2 * max(self.strides) + 1)
        if self.is_padded and not self._takes(2 * max(self.strides)):
            raise ConfigError(f"backbone {name!r}: takes images of one size alone: choose another network")
        self.is_frozen = frozen_maps is None or frozen_maps >= len(info.strides)
        freeze_batch_norm_2d(self.network)
        if self.is_frozen:
            self.requires_grad_(False)
        elif frozen_maps:
            self._freeze_up_to(info.modules[frozen_maps - 1])
        self._freeze_unused()

    def train(self, mode: bool = True) -> TimmNet:
        """Sets the mode; a frozen network stays in eval mode."""
        super().train(mode)
        if self.is_frozen:
            self.network.eval()
        return self

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Returns maps of images (B, 3, H, W) normalised by `mean` and `std`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            if self.is_plain_vit:
                return self.network.forward_intermediates(
                    pixels, indices=_LAST_BLOCKS, norm=True, output_fmt="NCHW", intermediates_only=True
                )
            height, width = pixels.shape[2:]
            if self.is_padded:
                pixels = F.pad(pixels, (0, -width % max(self.strides), 0, -height % max(self.strides)))
            maps = self.network(pixels)
            is_last = str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC")
            maps = [level.permute(0, 3, 1, 2).contiguous() for level in maps] if is_last else list(maps)
            cells = [(-(-height // stride), -(-width // stride)) for stride in self.strides]
            return [level[..., :rows, :columns] for level, (rows, columns) in zip(maps, cells, strict=True)]

    def load_pretrained(self) -> None:
        """Loads timm's weights, fetched by name.

        Raises:
            WeightsError: they cannot be fetched, or do not fit.
        """
        self.load_state(pretrained_state(self.name), where=self.name)
        log.info("backbone %s: weights of timm, licence: %s", self.name, timm_info(self.name).license or "not stated")

    def load_state(self, state: Mapping[str, Tensor], *, where: str) -> None:
        """Loads a state dict of the whole network.

        timm gives modules of a network that returns maps other names: `stages.0` may be `stages_0` or `model.stages.0`.

        Raises:
            WeightsError: a weight is missing or has another shape; `where` names the file.
        """
        by_key = {_plain(key): (key, value) for key, value in state.items()}
        loaded = {}
        for key, own in self.network.state_dict().items():
            name, value = by_key.get(_plain(key), (key, None))
            if value is None and key.endswith("num_batches_tracked"):
                continue
            if value is None:
                raise WeightsError(f"{where}: has no {key}: give weights of timm's {self.name}")
            if value.shape != own.shape:
                raise WeightsError(
                    f"{where}: {name} is {tuple(value.shape)}, must be {tuple(own.shape)}: give weights of timm's "
                    f"{self.name}"
                )
            loaded[key] = value
        self.network.load_state_dict(loaded, strict=False)

    @torch.no_grad()
    def _takes(self, side: int) -> bool:
        """Returns whether the network takes images of a side."""
        try:
            self.network.eval()(torch.zeros(1, 3, side, side))
        except (AssertionError, RuntimeError, ValueError):
            return False
        return True

    def _freeze_up_to(self, module: str) -> None:
        """Freezes all weights up to those of a module, in the order in which the network is defined."""
        modules = [(f"{_plain(name)}_", part) for name, part in self.network.named_modules()]
        last = max(place for place, (name, _) in enumerate(modules) if name.startswith(f"{_plain(module)}_"))
        for _, part in modules[: last + 1]:
            for parameter in part.parameters(recurse=False):
                parameter.requires_grad_(False)

    def _freeze_unused(self) -> None:
        """Freezes weights that no returned map depends on: each trained weight must take part in every step."""
        trained = [p for p in self.network.parameters() if p.requires_grad]
        if not trained:
            return
        side = 2 * max(self.strides)
        with torch.enable_grad():
            total = torch.stack([level.float().sum() for level in self(torch.zeros(1, 3, side, side))]).sum()
        grads = torch.autograd.grad(total, trained, allow_unused=True)
        for parameter, grad in zip(trained, grads, strict=True):
            if grad is None:
                parameter.requires_grad_(False)


class TimmCrops(TimmNet):
    """A frozen network on crops or whole images: its last two maps, with standard deviations of about 1.

    Args:
        name: timm's name of the network.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, strides=timm_info(name).strides[-2:])
        self.register_buffer("scale", self._measure_scale())

    @property
    def crop_channels(self) -> tuple[int, ...]:
        """Channels of the maps."""
        return self.channels

    @property
    def crop_strides(self) -> tuple[int, ...]:
        """Strides of the maps, pixels."""
        return self.strides

    def at_once(self, device: torch.device) -> int:
        """Returns the batch size of crops; maps of more crops do not fit a CPU's cache."""
        return 16 if device.type == "cpu" else 512

    @torch.no_grad()
    def crop_maps(self, crops: Tensor) -> list[Tensor]:
        """Returns the maps (B, D, h, w) of normalised crops (B, 3, H, W)."""
        scales: Any = self.scale
        return [maps * scale for maps, scale in zip(self(crops), scales, strict=True)]

    def load_state(self, state: Mapping[str, Tensor], *, where: str) -> None:
        """See `TimmNet.load_state`."""
        super().load_state(state, where=where)
        self.scale = self._measure_scale()

    @torch.no_grad()
    def _measure_scale(self) -> Tensor:
        """Returns (maps,): one over the standard deviation of each map of a picture whose spectrum is a photograph's.

        The amplitude of a photograph falls with one over the frequency.
        """
        generator, side = torch.Generator().manual_seed(0), 4 * max(self.strides)
        frequency = torch.fft.fftfreq(side)[:, None].square() + torch.fft.rfftfreq(side).square()
        spectrum = torch.fft.rfft2(torch.randn(1, 3, side, side, generator=generator))
        picture = torch.fft.irfft2(spectrum / frequency.sqrt().clamp(min=1 / side), s=(side, side))
        picture = picture / picture.std()
        self.network.eval()
        spreads = torch.stack([maps.float().std() for maps in self(picture)])
        return 1 / spreads.clamp(min=1e-6)


def pretrained_state(name: str) -> dict[str, Tensor]:
    """Returns timm's weights of the whole network, fetched by name.

    Raises:
        WeightsError: they cannot be fetched, or timm has none.
    """
    import timm

    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(
            f"backbone {name!r}: its weights cannot be fetched ({error}): give them as a file in `weights`"
        ) from error


def _build(name: str, indices: Sequence[int], is_plain_vit: bool) -> Any:
    import timm

    if is_plain_vit:
        return timm.create_model(name, num_classes=0, dynamic_img_size=True, dynamic_img_pad=True)
    options: dict[str, Any] = {"features_only": True, "out_indices": tuple(indices)}
    try:
        return timm.create_model(name, **options, strict_img_size=False)  # windows of any image, where there are some
    except TypeError:
        return timm.create_model(name, **options)


def _plain(key: str) -> str:
    return key.removeprefix("model.").replace(".", "_")
