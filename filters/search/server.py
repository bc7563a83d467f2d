"""The search page of a dataset: `sdtrain search DATASET --serve`.

The server renders the page with an escaping template; its script only sends a dropped image. Images are named by key,
which is digits, and read from the tars at the offsets in the tables.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import socket
from collections import OrderedDict
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import uvicorn
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from filters.search.hits import KEY, Hit, image_bytes, image_of
from filters.search.search import MAX_PICTURE_BYTES, Search, read_image
from filters.search.sheet import PAGES, environment, small
from sdtrain.errors import UserError

_MAX_CHARS, _ASKED_KEPT, _SHOWN_KEPT, _THUMBNAIL_PX = 1000, 64, 4096, 360
_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp", "avif": "image/avif", "jxl": "image/jxl"}
# Foreign pages cannot send this type without a CORS preflight, which the server never grants.
_DROPPED_TYPE = "application/octet-stream"
_ASSETS = {"search.css": "text/css", "search.js": "text/javascript", "icon.svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


@dataclass(frozen=True)
class Asked:
    """An image dropped on the page: its embedding (1, D) and a small copy."""

    vectors: NDArray[np.float32]
    thumbnail: bytes


@dataclass
class SearchPage:
    """Answers requests on a dataset with `top` images per page."""

    search: Search
    top: int
    _asked: OrderedDict[str, Asked] = field(default_factory=OrderedDict)
    _shown: OrderedDict[str, Hit] = field(default_factory=OrderedDict)
    _decoding: Lock = field(default_factory=Lock)  # one large image in memory at a time

    def app(self, hosts: list[str]) -> Starlette:
        """Returns the application, which rejects other hosts' names, lest a foreign page reach it by its own name."""
        routes = [
            Route("/", self._show),
            Route("/ask", self._ask, methods=["POST"]),
            Route("/asked/{name:str}", self._show_asked),
            Route("/image/{key:str}", self._image),
            Route("/thumb/{key:str}", self._thumb),
            Route("/assets/{name:str}", self._asset),
        ]
        guards = [
            Middleware(BaseHTTPMiddleware, dispatch=_with_headers),
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts),
        ]
        return Starlette(routes=routes, middleware=guards)

    async def _show(self, request: Request) -> Response:
        asked = {name: request.query_params.get(name, "") for name in ("q", "by", "only", "like", "image")}
        return HTMLResponse(await asyncio.to_thread(self._render, asked))

    def _render(self, asked: dict[str, str]) -> str:
        by = asked["by"] or ("words" if self.search.is_stand_in else "meaning")
        context: dict[str, Any] = {"question": asked["q"][:_MAX_CHARS], "by": by, "only": asked["only"], "error": ""}
        context |= {"hits": None, "asked": "", "name": self.search.dataset.root.name}
        context |= {"num_images": self.search.num_images, "is_exact": self.search.is_exact}
        try:
            context["hits"], context["asked"] = self._find(asked, by)
            self._remember_shown(context["hits"] or [])
        except UserError as error:
            context["error"] = str(error)
        return environment().get_template("search.html").render(context | {"is_stand_in": self.search.is_stand_in})

    def _find(self, asked: dict[str, str], by: str) -> tuple[list[Hit] | None, str]:
        """Returns the hits, and the address of the query image."""
        question, kept = asked["q"].strip()[:_MAX_CHARS], asked["only"] == "kept"
        if asked["image"]:
            known = self._asked.get(asked["image"])
            if known is None:
                raise UserError("That image is forgotten. Drop it again.")
            return self.search.nearest(known.vectors, self.top, kept)[0], f"/asked/{asked['image']}"
        if asked["like"]:
            hit = self._hit(asked["like"])
            image = image_of(self.search.dataset, hit) if hit else None
            if hit is None or image is None:
                raise UserError("There is no such image.")
            return self.search.by_images([image], self.top, kept)[0], f"/thumb/{hit.key}"
        if not question:
            return None, ""
        if by == "words":
            return self.search.by_words(question, self.top, kept), ""
        return self.search.by_caption(question, self.top, kept), ""

    async def _ask(self, request: Request) -> Response:
        if request.headers.get("content-type") != _DROPPED_TYPE:
            return JSONResponse({"error": f"Send the image as {_DROPPED_TYPE}."}, 415)
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > MAX_PICTURE_BYTES:
                return JSONResponse({"error": f"More than {MAX_PICTURE_BYTES // 2**20} MB."}, 413)
        try:
            return JSONResponse({"image": await asyncio.to_thread(self._remember, bytes(content))})
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)

    def _remember(self, content: bytes) -> str:
        name = hashlib.sha256(content).hexdigest()[:32]
        with self._decoding:
            image = read_image(content, "What was dropped")
            self._asked[name] = Asked(self.search.embed([image]), _jpeg(small(image, _THUMBNAIL_PX)))
        while len(self._asked) > _ASKED_KEPT:
            self._asked.popitem(last=False)
        return name

    async def _show_asked(self, request: Request) -> Response:
        known = self._asked.get(request.path_params["name"])
        return Response(known.thumbnail, media_type="image/jpeg") if known else _not_there()

    async def _image(self, request: Request) -> Response:
        hit = await asyncio.to_thread(self._hit, request.path_params["key"])
        try:
            content = await asyncio.to_thread(image_bytes, self.search.dataset, hit) if hit else b""
        except OSError:
            content = b""
        except UserError as error:
            return PlainTextResponse(str(error), 502)
        return Response(content, media_type=_TYPES[hit.extension]) if hit and content else _not_there()

    async def _thumb(self, request: Request) -> Response:
        try:
            content = await asyncio.to_thread(self._thumbnail, request.path_params["key"])
        except UserError as error:
            return PlainTextResponse(str(error), 502)
        return Response(content, media_type="image/jpeg") if content else _not_there()

    async def _asset(self, request: Request) -> Response:
        kind = _ASSETS.get(request.path_params["name"])
        return FileResponse(PAGES / request.path_params["name"], media_type=kind) if kind else _not_there()

    def _thumbnail(self, key: str) -> bytes:
        hit = self._hit(key)
        image = image_of(self.search.dataset, hit) if hit else None
        return _jpeg(small(image, _THUMBNAIL_PX)) if image else b""

    def _hit(self, key: str) -> Hit | None:
        if not KEY.fullmatch(key):
            return None
        return self._shown.get(key) or self.search.by_key(key)

    def _remember_shown(self, hits: list[Hit]) -> None:
        self._shown |= {hit.key: hit for hit in hits}
        while len(self._shown) > _SHOWN_KEPT:
            self._shown.popitem(last=False)


def serve(search: Search, host: str, port: int, top: int) -> None:
    """Serves the page until the process ends; port 0 takes a free one; raises `UserError` if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # before the address is printed: whoever reads it may connect at once
    except OSError as error:
        raise UserError(f"{host} port {port} is not available ({error.strerror}). Choose another --port.") from error
    loopback = host in ("127.0.0.1", "::1", "localhost")
    hosts = ["127.0.0.1", "localhost", "[::1]"] if loopback else ["*"]
    app = SearchPage(search, top).app(hosts)
    print(f"{search.num_images:,} images of {search.dataset}", flush=True)
    if not loopback:
        print("Everyone who reaches this address sees the images; there is no password.", flush=True)
    print(f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/  (Ctrl-C ends it)", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off")).run([listener])


def _jpeg(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


async def _with_headers(request: Request, answer: RequestResponseEndpoint) -> Response:
    response = await answer(request)
    response.headers.update(_HEADERS)
    return response


def _not_there() -> Response:
    return Response("There is no such thing.", 404, media_type="text/plain")
