"""Weights that come with the package."""

from pathlib import Path

SHIPPED = {"vit_xs": Path(__file__).parent / "weights" / "vit_xs.safetensors"}
