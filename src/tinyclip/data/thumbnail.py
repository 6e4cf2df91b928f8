"""A picture of a data set as text that a page or a JSON file holds."""

from __future__ import annotations

import base64
import io

from tinyclip.data.sources import Source

THUMBNAIL_PX = 112  # shown at up to 96 CSS px


def thumbnail(source: Source, index: int, *, side: int = THUMBNAIL_PX, quality: int = 72) -> str:
    """A data URI: WebP, at most `side` pixels a side, transparency on white."""
    from PIL import Image

    picture = source.image(index).convert("RGBA")
    picture.thumbnail((side, side))
    white = Image.new("RGBA", picture.size, "white")
    content = io.BytesIO()
    Image.alpha_composite(white, picture).convert("RGB").save(content, "WEBP", quality=quality)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
