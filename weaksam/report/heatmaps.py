"""Draws a classifier's heatmaps of an image's likeliest class, with their peaks, for the pictures of a report.

No table stores heatmaps: the classifier runs again on the few images that are shown, on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from weaksam.core.cache import fetch
from weaksam.core.config import parse_settings
from weaksam.errors import WeakSamError
from weaksam.report.panels import Panel, heatmap_panel
from weaksam.report.run_files import RunStep
from weaksam.stages.proposals import ProposalsConfig

log = logging.getLogger(__name__)

_HEAT = np.array([[0, 0, 60], [120, 20, 120], [240, 80, 40], [255, 220, 60]], np.float32)  # cold to hot


@dataclass(frozen=True)
class HeatmapRenderer:
    """Draws heatmaps.

    Attributes:
        step: the proposals step whose labels and peaks the heatmaps explain.
        draw: returns one panel per kind of heatmap for an image (H, W, 3) uint8 and its labels.
    """

    step: str
    draw: Callable[[np.ndarray, Sequence[int] | None], list[Panel]]


def make_renderer(proposals: RunStep, names: Sequence[str]) -> HeatmapRenderer | None:
    """Returns a renderer for the classifier of a proposals step; None without a classifier or if it cannot be read."""
    classifier = proposals.step.inputs.get("classifier")
    if classifier is None or proposals.manifest is None:
        return None
    from weaksam.models.classifiers.build import load_trained
    from weaksam.models.classifiers.peak_prompts import KINDS, find_peak_prompts, shrink

    trained = classifier.config
    config, faults = parse_settings(ProposalsConfig, proposals.step.config, where=proposals.name)
    if config is None:
        log.warning("no heatmaps: %s", "; ".join(faults))
        return None
    try:
        weights = fetch(classifier.weights_uri)
        options = {"gated": trained.get("gated", False), "fine_of": trained.get("fine_of", "both")}
        model = load_trained(weights, trained["backbone"], len(names), **options)
    except (WeakSamError, FileNotFoundError) as error:
        log.warning("no heatmaps: %s", error)
        return None
    rules = config.peaks.rules(model.depth)
    title = f"{classifier.name} heatmaps"

    def render(image: np.ndarray, labels: Sequence[int] | None) -> list[Panel]:
        prompts, heatmaps = find_peak_prompts(model, image, labels, rules)
        if not len(prompts.labels):
            return []
        first = max(range(len(prompts.labels)), key=lambda at: float(prompts.probabilities[prompts.labels[at]]))
        label = int(prompts.labels[first])
        small, panels = shrink(image, rules.max_side), []
        for kind, maps in heatmaps.items():
            if not maps.shape[1]:  # a classifier without attention has no cross maps
                continue
            is_shown = (prompts.kinds == KINDS.index(kind)) & (prompts.point_labels == label)
            heat = draw_heatmap(small, maps[first].mean(0).cpu().numpy())
            panels.append(heatmap_panel(title, kind, heat, prompts.points[is_shown], names[label]))
        return panels

    return HeatmapRenderer(proposals.name, render)


def draw_heatmap(image: np.ndarray, heatmap: np.ndarray) -> Image.Image:
    """Returns a heatmap blended over the grey image.

    Args:
        image: (H, W, 3) uint8 RGB.
        heatmap: (H, W) float in [0, 1].
    """
    place = heatmap.clip(0, 1) * (len(_HEAT) - 1)
    heat = np.stack([np.interp(place, range(len(_HEAT)), _HEAT[:, channel]) for channel in range(3)], -1)
    grey = image.mean(2, keepdims=True)
    return Image.fromarray((0.45 * grey + 0.55 * heat).clip(0, 255).astype(np.uint8))
