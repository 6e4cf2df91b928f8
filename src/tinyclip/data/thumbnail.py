"""A picture of a data set as text that a page or a JSON file holds."""

from __future__ import annotations

import base64
import io

from tinyclip.data.decode import to_rgb
from tinyclip.data.sources import Source

THUMBNAIL_PX = 112  # shown at up to 96 CSS px


def thumbnail(source: Source, index: int, *, side: int = THUMBNAIL_PX, quality: int = 72) -> str:
    """A data URI: WebP, at most `side` pixels a side, transparency on white."""
    picture = to_rgb(source.image(index))
    picture.thumbnail((side, side))
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=quality)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
