"""The backbones of weakly supervised detectors by name; imports no torch."""

from __future__ import annotations

BACKBONES = ("vgg16", "resnet50", "frozen_sam", "efficientnet_lite0", "efficientnet_lite0+frozen_sam")
