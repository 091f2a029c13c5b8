"""SAM as a batch engine: encode an image once, decode thousands of prompts, keep few masks."""

from pathlib import Path

# Weights that come with the package.
SHIPPED = {"vit_xs": Path(__file__).parent / "weights" / "vit_xs.safetensors"}
