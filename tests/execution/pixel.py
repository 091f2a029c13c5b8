"""The smallest image: a file may have anything behind it and is still that image."""

from __future__ import annotations

import io

from PIL import Image

_buffer = io.BytesIO()
Image.new("RGB", (1, 1)).save(_buffer, "PNG")
PIXEL = _buffer.getvalue()
