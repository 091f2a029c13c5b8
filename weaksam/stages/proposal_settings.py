"""Settings of `proposals`: the segmenter, its prompts, and the rules that select its boxes.

benchmarks/README.md explains the choice of the defaults, with a table; configs/reference/ has the published values.
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
    """The SAM model and its weights."""

    model: Annotated[str, Choice(tuple(VARIANTS))] = "vit_h"
    """Encoder; `vit_xs` is the small demo model that comes with this package."""
    checkpoint: Annotated[str | None, OutsideFile()] = None
    """URI of the weights, e.g. of the official `sam_vit_h_4b8939.pth`; only `vit_xs` comes with weights."""
    sha256: Annotated[str | None, NotInFingerprint()] = Field(default=None, pattern="^[0-9a-fA-F]{64}$")
    """SHA-256 that the weights file must have."""

    precision: Literal["fp32", "fp16", "bf16"] | None = None
    """fp32 when left out, with the same masks as segment-anything. fp16, for GPUs, and bf16 round products and are
    faster."""

    @model_validator(mode="after")
    def _weights_are_named(self) -> SamSettings:
        if self.model != "vit_xs" and self.checkpoint is None:
            raise ValueError(f"checkpoint is required for {self.model}: the URI of its weights file")
        return self


class GridSettings(Settings):
    """A grid of single-point prompts, and the limits for its masks."""

    points_per_side: int = Field(default=32, ge=1, le=256)
    """Points along each side of the image."""
    pred_iou_threshold: float = Field(default=0.3, ge=0, le=1)
    """Masks that SAM itself rates at or below this IoU are dropped."""
    stability_threshold: float = Field(default=0.3, ge=0, le=1)
    """Masks that change more than this (IoU) when the mask threshold moves by +-1 are dropped."""
    nms_threshold: float = Field(default=0.7, gt=0, le=1)
    """Of two boxes that overlap by more than this IoU, the box that SAM rates lower is dropped."""
    # Differs from the published runs, which use 0.3: that drops every part of a kept whole object and every whole
    # object of a kept part. configs/reference/ has 0.3.


class PeakSettings(Settings):
    """Peaks of one kind of heatmap."""

    enabled: bool = True
    """Whether these peaks prompt SAM."""
    kernel: int = Field(default=17, ge=1)
    """Side of the window in which a peak is the maximum, odd, in pixels of the heatmap."""
    threshold: float = Field(default=0.9, ge=0, le=1)
    """Lowest value of a peak; heatmaps range from 0 to 1."""
    max_peaks: int = Field(default=25, ge=1)
    """Most peaks of a heatmap, the highest first."""
    joint: bool = True
    """Whether all peaks of a class together are also a prompt."""
    nms_threshold: float | None = Field(default=0.9, gt=0, le=1)
    """Of two boxes of this source that overlap by more than this IoU, the later box is dropped; null keeps all."""

    @model_validator(mode="after")
    def _kernel_is_odd(self) -> PeakSettings:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        return self


class CrossSettings(PeakSettings):
    """Peaks of cross-attention maps: one map per class, head and layer."""

    kernel: int = Field(default=129, ge=1)
    """Side of the window in which a peak is the maximum, odd, in pixels of the heatmap."""
    joint: bool = False
    """Whether all peaks of a class together are also a prompt."""
    layers: list[int] | None = Field(default=None, min_length=1)
    """Layers whose attention is used, counted from 1; when left out, those after two thirds and up to five sixths of
    the depth (9 and 10 of 12)."""
    cluster: Literal["per_class", "pooled", "off"] = "per_class"
    """Whether nearby peaks are merged: within their class, across classes (`pooled`, as published), or not."""
    peaks_per_cluster: int = Field(default=5, ge=1)
    """Average number of peaks that are merged into a cluster."""
    centre: Literal["member", "mean"] = "member"
    """The point that replaces a cluster: the peak nearest to its mean, or the mean (as published), which may miss the
    object."""


class PeakPromptSettings(Settings):
    """Labels and peaks of the classifier's heatmaps, which become prompts of SAM."""

    known_splits: list[str] | None = None
    """Splits whose image-level labels may be used; images of other splits get predicted labels. When left out, the
    split that the classifier was trained on."""
    label_threshold: float = Field(default=0.378, gt=0, lt=1)
    """Probability above which a class is predicted; the most probable class is always predicted."""
    scales: list[float] = Field(default=[1.0, 0.8, 1.2], min_length=1)
    """Sizes of the views relative to the image; each view is also mirrored."""
    max_side: int = Field(default=640, ge=32)
    """Images with a longer side are shrunk to this for the classifier, pixels."""
    snap: bool = True
    """Whether to round the sides of views to whole patches; otherwise heatmaps drift by up to 15 pixels (as
    published)."""
    collapse_plateaus: bool = True
    """Whether a plateau is one peak; otherwise each of its pixels is a peak (as published)."""
    coarse: PeakSettings = PeakSettings()
    """Class activation maps."""
    fine: PeakSettings = PeakSettings()
    """Class activation maps refined by attention."""
    cross: CrossSettings = CrossSettings()
    """Attention of class tokens to patches."""
    keep_masks: list[Literal[0, 1, 2]] = Field(default=[0, 1, 2], min_length=1)
    """Indices of SAM's three masks of a prompt that are used; published: [1, 2]."""
    pred_iou_threshold: float = Field(default=0.3, ge=0, le=1)
    """Masks that SAM itself rates at or below this IoU are dropped; published: none."""
    stability_threshold: float = Field(default=0.3, ge=0, le=1)
    """Masks that change more than this (IoU) when the mask threshold moves by +-1 are dropped; published: none."""

    def rules(self, depth: int) -> PeakPromptRules:
        """Returns these settings as `PeakPromptRules`, for a classifier with `depth` layers."""
        from weaksam.models.classifiers.peak_prompts import PeakPromptRules

        layers = self.cross.layers or list(range(depth * 2 // 3 + 1, depth * 5 // 6 + 1))
        kinds = {"coarse": self.coarse, "fine": self.fine, "cross": self.cross}
        return PeakPromptRules(
            scales=tuple(self.scales),
            max_side=self.max_side,
            snap=self.snap,
            label_threshold=self.label_threshold,
            cross_layers=tuple(layer - 1 for layer in layers),
            peaks={kind: self._rule(peaks) for kind, peaks in kinds.items() if peaks.enabled},
        )

    def _rule(self, peaks: PeakSettings) -> PeakRule:
        from weaksam.models.classifiers.peak_prompts import PeakRule

        rule = PeakRule(peaks.kernel, peaks.threshold, peaks.max_peaks, self.collapse_plateaus)
        if not isinstance(peaks, CrossSettings):
            return rule
        return replace(rule, cluster=peaks.cluster, peaks_per_cluster=peaks.peaks_per_cluster, centre=peaks.centre)


class ProposalResources(PoolResources):
    """The resources of the workers of `proposals` and `pseudo_masks`."""

    points_per_chunk: int | None = Field(default=None, ge=1)
    """Prompts decoded at once, chosen by device when left out; halved automatically when memory runs out."""
    compile_encoder: bool = False
    """Whether PyTorch compiles SAM's encoder: a GPU encodes faster, after minutes of compilation in each actor."""


class ProposalsConfig(StageConfig):
    """Prompts SAM over each image and keeps the boxes of its masks.

    Writes one row per image: boxes with SAM's own rating, their stability and their source, which is a grid or, with a
    classifier, peaks of its heatmaps. The row also has the peaks.
    """

    images: Annotated[str, Reads("images")]
    """The `index` step whose images are used."""
    classifier: Annotated[str | None, Reads("classifier")] = None
    """The step whose classifier prompts SAM with its peaks; only the grid prompts when left out."""
    split: str | None = None
    """Only images of this split; all when left out."""
    sam: SamSettings
    """The segmenter."""
    grid: GridSettings = GridSettings()
    """Prompts all over the image, independent of classes."""
    peaks: PeakPromptSettings = PeakPromptSettings()
    """Prompts from the classifier."""
    duplicate_threshold: float | None = Field(default=0.95, gt=0, le=1)
    """A box that overlaps a box of an earlier source (grid, coarse, fine, cross) by more than this IoU is dropped."""
    max_proposals: int | None = Field(default=None, ge=1)
    """Most boxes of an image, the highest rated first."""
    masks: bool = False
    """Whether to write the masks too, as run lengths: about ten times the size."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Larger images are refused with status `too_large`."""
    resources: ProposalResources = ProposalResources()
    """Resources of the workers."""
