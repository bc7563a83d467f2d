"""Questions with images, as the server's protocol writes them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from sdtrain.endpoint.config import EndpointConfig

if TYPE_CHECKING:
    from PIL import Image

JPEG_QUALITY = 90


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        prompt: the words.
        images: JPEG files (`jpeg_of`), sent before the words.
        max_tokens: of the answer; a longer one is cut off by the server.
        top_logprobs: how many alternatives to the answer's first token to report, with their probabilities; 0 for none.
    """

    prompt: str
    images: tuple[bytes, ...] = ()
    max_tokens: int = 128
    top_logprobs: int = 0


def jpeg_of(image: Image.Image, longest_px: int) -> bytes:
    """Encodes an RGB image as JPEG, its longest side at most `longest_px`: the same bytes for the same pixels.

    Nothing but pixels is in the file: no EXIF block with a place or a name.
    """
    scale = longest_px / max(image.size)
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), 3)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY, exif=b"", icc_profile=None)
    return file.getvalue()


@cache
def grey_jpeg() -> bytes:
    """A small image that no model or server has a reason to refuse."""
    from PIL import Image

    return jpeg_of(Image.new("RGB", (64, 64), (128, 128, 128)), 64)


def body_of(request: Request, config: EndpointConfig) -> dict[str, Any]:
    """The JSON body of POST /chat/completions; greedy, so that the same question has the same answer."""
    pictures = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in request.images]
    words = {"type": "text", "text": request.prompt}
    body: dict[str, Any] = {
        "model": config.model,
        "messages": [{"role": "user", "content": [*pictures, words]}],
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "seed": config.seed,
    }
    return body | ({"logprobs": True, "top_logprobs": request.top_logprobs} if request.top_logprobs else {})


def _data_url(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
