"""Settings of `proposals`: the segmenter, what prompts it, and which of its boxes stay.

benchmarks/README.md has the table the defaults were chosen from, and why; configs/reference/ has the published ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from weaksam.core.config import Choice, NotInFingerprint, OutsideFile, Reads, Settings, StageConfig
from weaksam.execution.pools import PoolResources
from weaksam.sam.variants import VARIANTS

if TYPE_CHECKING:
    from weaksam.models.classifiers.peak_prompts import PeakPromptRules, PeakRule


class SamSettings(Settings):
    """Which SAM, and its weights."""

    model: Annotated[str, Choice(tuple(VARIANTS))] = "vit_h"
    """Encoder; `vit_xs` is the small demo model that comes with this package."""
    checkpoint: Annotated[str | None, OutsideFile()] = None
    """URI of the weights, e.g. of the official `sam_vit_h_4b8939.pth`; only `vit_xs` has weights of its own."""
    sha256: Annotated[str | None, NotInFingerprint()] = Field(default=None, pattern="^[0-9a-fA-F]{64}$")
    """SHA-256 that the weights file must have."""

    precision: Literal["fp32", "fp16", "bf16"] | None = None
    """fp32 when left out: the masks of segment-anything. fp16, for GPUs, and bf16 round products and are faster."""

    @model_validator(mode="after")
    def _weights_are_named(self) -> SamSettings:
        if self.model != "vit_xs" and self.checkpoint is None:
            raise ValueError(f"checkpoint is required for {self.model}: the URI of its weights file")
        return self


class GridSettings(Settings):
    """A grid of single-point prompts, and which of its masks stay."""

    points_per_side: int = Field(default=32, ge=1, le=256)
    """Points along each side of the image."""
    pred_iou_threshold: float = Field(default=0.3, ge=0, le=1)
    """Masks that SAM itself rates at or below this IoU are dropped."""
    stability_threshold: float = Field(default=0.3, ge=0, le=1)
    """Masks that change more than this (IoU) when the mask threshold moves by +-1 are dropped."""
    nms_threshold: float = Field(default=0.7, gt=0, le=1)
    """Of two boxes that overlap by more than this IoU, the one SAM rates lower is dropped."""
    # Differs from the published runs, which use 0.3: that deletes every part of a kept whole and every whole of a
    # kept part. configs/reference/ has 0.3.


class PeakSettings(Settings):
    """Peaks of one kind of heatmap."""

    enabled: bool = True
    """Whether these peaks prompt SAM."""
    kernel: int = Field(default=17, ge=1)
    """Side of the window that a peak is the maximum of, odd, in pixels of the heatmap."""
    threshold: float = Field(default=0.9, ge=0, le=1)
    """Lowest value a peak may have; a heatmap reaches from 0 to 1."""
    max_peaks: int = Field(default=25, ge=1)
    """Most peaks of one heatmap, the highest."""
    joint: bool = True
    """Whether all peaks of a class are also one prompt together."""
    nms_threshold: float | None = Field(default=0.9, gt=0, le=1)
    """Of two boxes of this source that overlap by more than this IoU the later one is dropped; null keeps all."""

    @model_validator(mode="after")
    def _kernel_is_odd(self) -> PeakSettings:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        return self


class CrossSettings(PeakSettings):
    """Peaks of cross-attention maps: one map per class, head and layer."""

    kernel: int = Field(default=129, ge=1)
    """Side of the window that a peak is the maximum of, odd, in pixels of the heatmap."""
    joint: bool = False
    """Whether all peaks of a class are also one prompt together."""
    layers: list[int] | None = Field(default=None, min_length=1)
    """Layers whose attention is used, counted from 1; the third quarter of them when left out (9 and 10 of 12)."""
    cluster: Literal["per_class", "pooled", "off"] = "per_class"
    """Whether nearby peaks become one: within their class, whatever their class (as published), or not."""
    peaks_per_cluster: int = Field(default=5, ge=1)
    """Peaks that become one, on average."""
    centre: Literal["member", "mean"] = "member"
    """What they become: the peak nearest to their mean, or the mean (as published), which may miss the object."""


class PeakPromptSettings(Settings):
    """What the classifier tells SAM: labels, and peaks of heatmaps as prompts."""

    known_splits: list[str] | None = None
    """Splits whose image-level labels may be used; others get predicted ones. The classifier's own when left out."""
    label_threshold: float = Field(default=0.378, gt=0, lt=1)
    """A class is predicted when its probability is above this; the likeliest one always is."""
    scales: list[float] = Field(default=[1.0, 0.8, 1.2], min_length=1)
    """Sizes of the views of an image, times its own; each is seen mirrored too."""
    max_side: int = Field(default=640, ge=32)
    """Longer images are shrunk to this for the classifier, pixels."""
    snap: bool = True
    """Round the sides of views to whole patches; otherwise heatmaps drift by up to 15 pixels (as published)."""
    collapse_plateaus: bool = True
    """A flat top is one peak; otherwise each of its pixels is (as published)."""
    coarse: PeakSettings = PeakSettings()
    """Class activation maps."""
    fine: PeakSettings = PeakSettings()
    """Class activation maps refined by attention."""
    cross: CrossSettings = CrossSettings()
    """Attention of class tokens to patches."""
    keep_masks: list[Literal[0, 1, 2]] = Field(default=[0, 1, 2], min_length=1)
    """Which of SAM's three masks of a prompt are used; published: [1, 2]."""
    pred_iou_threshold: float = Field(default=0.3, ge=0, le=1)
    """Masks that SAM itself rates at or below this IoU are dropped; published: none."""
    stability_threshold: float = Field(default=0.3, ge=0, le=1)
    """Masks that change more than this (IoU) when the mask threshold moves by +-1 are dropped; published: none."""

    def rules(self, depth: int) -> PeakPromptRules:
        """The same for `models.classifiers.peak_prompts`, for a classifier of `depth` layers."""
        from weaksam.models.classifiers.peak_prompts import PeakPromptRules

        layers = self.cross.layers or list(range(depth * 2 // 3 + 1, depth * 5 // 6 + 1))
        kinds = {"coarse": self.coarse, "fine": self.fine, "cross": self.cross}
        return PeakPromptRules(
            scales=tuple(self.scales),
            max_side=self.max_side,
            snap=self.snap,
            label_threshold=self.label_threshold,
            cross_layers=tuple(layer - 1 for layer in layers),
            peaks={kind: self._rule(one) for kind, one in kinds.items() if one.enabled},
        )

    def _rule(self, peaks: PeakSettings) -> PeakRule:
        from weaksam.models.classifiers.peak_prompts import PeakRule

        rule = PeakRule(peaks.kernel, peaks.threshold, peaks.max_peaks, self.collapse_plateaus)
        if not isinstance(peaks, CrossSettings):
            return rule
        return replace(rule, cluster=peaks.cluster, peaks_per_cluster=peaks.peaks_per_cluster, centre=peaks.centre)


class ProposalResources(PoolResources):
    """Where and how wide proposals run."""

    points_per_chunk: int | None = Field(default=None, ge=1)
    """Prompts decoded at once, chosen by device when left out; halves by itself when memory runs out."""
    compile_encoder: bool = False
    """Whether PyTorch compiles SAM's encoder: a GPU encodes faster, after minutes of compiling in each actor."""


class ProposalsConfig(StageConfig):
    """Prompts SAM over each image and keeps the boxes of its masks.

    One row an image: boxes with SAM's own rating, their stability, and what prompted them: a grid and, with a
    classifier, peaks of its heatmaps, which are kept too.
    """

    images: Annotated[str, Reads("images")]
    """The `index` step whose images are used."""
    classifier: Annotated[str | None, Reads("classifier")] = None
    """The step whose classifier points at objects; the grid alone prompts when left out."""
    split: str | None = None
    """Only images of this split; all when left out."""
    sam: SamSettings
    """The segmenter."""
    grid: GridSettings = GridSettings()
    """Prompts that look everywhere, whatever the classes."""
    peaks: PeakPromptSettings = PeakPromptSettings()
    """Prompts from the classifier."""
    duplicate_threshold: float | None = Field(default=0.95, gt=0, le=1)
    """A box that overlaps one of an earlier source (grid, coarse, fine, cross) by more than this IoU is dropped."""
    max_proposals: int | None = Field(default=None, ge=1)
    """Most boxes an image may keep, the highest rated first."""
    masks: bool = False
    """Keep the masks too, as run lengths: about ten times the size."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Larger images are refused with status `too_large`."""
    resources: ProposalResources = ProposalResources()
    """Where it runs."""
