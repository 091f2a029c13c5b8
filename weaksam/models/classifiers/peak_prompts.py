"""Class labels and peak points of an image, from a classifier's heatmaps.

In: an RGB image and, on training splits, its image-level labels. Out: labels, heatmaps and peaks, in pixels of the
image. Source: WeakSAM (arXiv 2402.14812), section 3.2. All kinds of heatmap come from one set of forwards: each scale
is one forward of the image and its mirror image.

Axis legend: C classes, c chosen classes, K cross maps of a class, h w patches, H W pixels, P peaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from weaksam.data.augment import normalise
from weaksam.models.classifiers.build import Classifier
from weaksam.ops.cams import fuse_views, snap_to_patches
from weaksam.ops.choices import check_choices
from weaksam.ops.peaks import cluster_peaks, find_peaks

KINDS = ("coarse", "fine", "cross")
_NO_PEAKS = (np.zeros((0, 2), np.float32), np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.uint8))


@dataclass(frozen=True)
class PeakRule:
    """Rule for the peaks of one kind of heatmap.

    Attributes:
        kernel: side of the window in which a peak is the maximum, in pixels of the heatmap.
        threshold: minimum value of a peak, of a heatmap in [0, 1].
        max_peaks: maximum number of peaks of one heatmap.
        collapse_plateaus: whether a plateau is one peak; otherwise each of its pixels counts.
        cluster: peaks of a class (`per_class`) or of all classes together (`pooled`) are replaced by cluster centres.
        peaks_per_cluster: average number of peaks of a cluster.
        centre: `member`, the peak nearest to the mean, or the `mean` itself.
    """

    kernel: int
    threshold: float = 0.9
    max_peaks: int = 25
    collapse_plateaus: bool = True
    cluster: Literal["per_class", "pooled", "off"] = "off"
    peaks_per_cluster: int = 5
    centre: Literal["member", "mean"] = "member"

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class PeakPromptRules:
    """Rules for views, labels and peaks.

    Attributes:
        scales: scales of the views.
        max_side: larger images are first shrunk to this longer side, which bounds time and memory; pixels.
        snap: whether sides of views are rounded to whole patches; otherwise maps drift by up to 13 px.
        label_threshold: probability above which a class counts as present, for images without labels.
        cross_layers: 0-based layers of the cross maps.
        peaks: rule of each kind of heatmap to use.
    """

    scales: tuple[float, ...] = (1.0, 0.8, 1.2)
    max_side: int = 640
    snap: bool = True
    label_threshold: float = 0.378
    cross_layers: tuple[int, ...] = (8, 9)
    peaks: Mapping[str, PeakRule] = field(
        default_factory=lambda: {
            "coarse": PeakRule(17),
            "fine": PeakRule(17),
            "cross": PeakRule(129, cluster="per_class"),
        }
    )


@dataclass(frozen=True)
class PeakPrompts:
    """Labels and peaks of one image.

    Attributes:
        labels: (c,) int32 chosen classes, rising.
        probabilities: (C,) float32.
        points: (P, 2) float32 peaks, x then y, pixels of the image.
        point_labels: (P,) int32 class of each; -1 where classes were pooled.
        scores: (P,) float32 height of the peak.
        kinds: (P,) uint8 index into KINDS.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    points: np.ndarray
    point_labels: np.ndarray
    scores: np.ndarray
    kinds: np.ndarray


@dataclass(frozen=True)
class Views:
    """Maps of one image at patch resolution: a tensor per scale, the sum with the mirrored view.

    Attributes:
        probabilities: (C,) float32, of the mean logits of all views.
        maps: per kind, per scale (C, K, h, w); K = 1 but for cross.
    """

    probabilities: np.ndarray
    maps: dict[str, list[Tensor]]


def compute_views(model: Classifier, image: np.ndarray, rules: PeakPromptRules) -> Views:
    """Runs the classifier on every view of an image.

    Args:
        model: in eval mode; its device is used.
        image: (H, W, 3) uint8 RGB.
    """
    patch, device = model.patch, model.device
    logits, maps = [], {kind: [] for kind in rules.peaks}
    layers = rules.cross_layers if "cross" in rules.peaks else ()
    picture = Image.fromarray(image)
    for scale in rules.scales:
        height, width = view_size(image.shape[:2], scale, patch, snap=rules.snap)
        resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
        view = normalise(resized, mean=model.mean, std=model.std)
        pair = torch.from_numpy(np.stack([view, view[:, :, ::-1]])).to(device)
        view_maps = model.find_maps(pair, cross_layers=layers)
        logits.append(view_maps.logits)
        for kind in maps:
            pair_maps = view_maps.cross.transpose(1, 2) if kind == "cross" else getattr(view_maps, kind).unsqueeze(2)
            maps[kind].append(pair_maps[0] + pair_maps[1].flip(-1))
    return Views(torch.cat(logits).float().mean(0).sigmoid().cpu().numpy(), maps)


def view_size(hw: tuple[int, ...], scale: float, patch: int, *, snap: bool) -> tuple[int, int]:
    """Returns (height, width) of a view; without `snap`, at least one patch a side."""
    if snap:
        return snap_to_patches((hw[0], hw[1]), scale=scale, patch=patch)
    return max(patch, round(hw[0] * scale)), max(patch, round(hw[1] * scale))


def choose_labels(probabilities: np.ndarray, *, threshold: float) -> np.ndarray:
    """Returns (c,) int32 classes counted as present: all above the threshold, else the most probable.

    Differs from the published code, which tries the next view when no class passes and returns none after the last.
    """
    labels = np.flatnonzero(probabilities > threshold)
    return (labels if len(labels) else np.array([probabilities.argmax()])).astype(np.int32)


def make_heatmaps(views: Views, labels: np.ndarray, size: tuple[int, int]) -> dict[str, Tensor]:
    """Returns (c, K, H, W) float32 in [0, 1] per kind, only of the classes `labels`, since enlarging is expensive."""
    heatmaps = {}
    for kind, scales in views.maps.items():
        index = torch.as_tensor(labels, dtype=torch.long, device=scales[0].device)
        chosen = [maps[index] for maps in scales]
        merged = fuse_views([maps.flatten(0, 1) for maps in chosen], size)
        heatmaps[kind] = merged.unflatten(0, chosen[0].shape[:2])
    return heatmaps


def find_peak_prompts(
    model: Classifier, image: np.ndarray, labels: Sequence[int] | None, rules: PeakPromptRules
) -> tuple[PeakPrompts, dict[str, Tensor]]:
    """Returns labels and peaks of an image, and their heatmaps.

    Args:
        model: in eval mode.
        image: (H, W, 3) uint8 RGB.
        labels: known classes of the image; None uses the classifier's.

    Returns:
        the prompts, and the result of `make_heatmaps` at the resolution of the peak search.
    """
    small = shrink(image, rules.max_side)
    views = compute_views(model, small, rules)
    if labels is None:
        chosen = choose_labels(views.probabilities, threshold=rules.label_threshold)
    else:
        chosen = np.unique(np.asarray(labels, np.int32))
    heatmaps = make_heatmaps(views, chosen, (small.shape[0], small.shape[1]))
    factor = np.array([image.shape[1] / small.shape[1], image.shape[0] / small.shape[0]])
    parts = [_peaks_of(kind, heatmaps[kind], chosen, rule, factor) for kind, rule in rules.peaks.items()]
    points, point_labels, scores, kinds = (np.concatenate(column) for column in zip(_NO_PEAKS, *parts, strict=True))
    return PeakPrompts(chosen, views.probabilities, points, point_labels, scores, kinds), heatmaps


def shrink(image: np.ndarray, max_side: int) -> np.ndarray:
    """Returns the image, or a smaller copy whose longer side is `max_side`."""
    factor = max_side / max(image.shape[:2])
    if factor >= 1:
        return image
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _peaks_of(
    kind: str, heatmaps: Tensor, labels: np.ndarray, rule: PeakRule, factor: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Returns points, their classes, scores and kinds for one kind of heatmap (c, K, H, W)."""
    peaks = find_peaks(
        heatmaps.flatten(0, 1),
        kernel=rule.kernel,
        threshold=rule.threshold,
        max_peaks=rule.max_peaks,
        collapse_plateaus=rule.collapse_plateaus,
    )
    points, scores = peaks.points.astype(np.float32), peaks.scores
    classes = labels[peaks.maps // max(heatmaps.shape[1], 1)].astype(np.int32)
    if rule.cluster != "off":
        groups = np.full_like(classes, -1) if rule.cluster == "pooled" else classes
        points, scores, classes = cluster_peaks(
            points, scores, groups, peaks_per_cluster=rule.peaks_per_cluster, centre=rule.centre
        )
    points = ((points + 0.5) * factor - 0.5).astype(np.float32)  # centre of the heatmap's pixel, in the image
    return points, classes, scores, np.full(len(points), KINDS.index(kind), np.uint8)
