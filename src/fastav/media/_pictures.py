"""The size of a picture by its header, before anything is decoded."""

import warnings

from PIL import Image

from fastav.errors import UnreadableMedia
from fastav.media._source import Source

MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
"""How pictures begin of which FFmpeg decodes one to learn its size."""


def check_picture(source: Source) -> None:
    """Raise UnreadableMedia if a picture's header says that it is too large."""
    head = source.head(16)
    if source.max_pixels is None or not (head.startswith(MAGIC) or head[8:12] == b"WEBP"):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source.stream() if source.path is None else source.path) as image:
                size = image.size
    except Image.DecompressionBombError:
        message = f"{source.name} is far too large a picture; the limit is {source.max_pixels:,} pixels"
        raise UnreadableMedia(message, "scale it down first") from None
    except Exception:  # Pillow's errors have many types; whether FFmpeg can read it is found next
        return
    source.check_pixels(*size)
