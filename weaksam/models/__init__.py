"""Networks: backbones, classifiers, weakly supervised detectors, detectors that learn from boxes and masks."""
