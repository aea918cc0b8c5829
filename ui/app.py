"""The app: Gradio's page with our six screens in it, in front of the screens' own routes."""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read by gradio at import
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from fastapi import FastAPI, Response
from fastapi.responses import FileResponse
from fastapi.routing import APIRouter

from grpo_engine.store import Store, StoreError

from . import compare, gallery, live, microscope, playground, system, train
from .context import Context, PlainRoute, Refused, answer
from .guard import Guard
from .worker import Worker

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
SCREENS = (
    ("train", "Train", train),
    ("live", "Live", live),
    ("gallery", "Before / after", gallery),
    ("compare", "Compare", compare),
    ("playground", "Playground", playground),
    ("system", "Runs & system", system),
)
LONGEST_PATH = 400  # characters; recorded ones have about 100
_PICTURE = re.compile(r"runs/[0-9]{4,}-[a-z0-9-]+/(images|thumbs)(/\w[\w.-]*)+\.(png|webp|jpg)")
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")


def build_page() -> gr.Blocks:
    """The page: a header and a tab for every screen; each tab holds one element that its script fills."""
    with gr.Blocks(title="Pure GRPO", analytics_enabled=False, fill_width=True) as page:
        _element("header", elem_id="g-header")
        with gr.Tabs(elem_id="g-tabs"):
            for name, title, _ in SCREENS:
                with gr.Tab(title, id=name, elem_id=f"tab-{name}", render_children=name == "train"):
                    _element(name)
    return page


def _element(name: str, **options: Any) -> gr.HTML:
    """An empty element that the script of screen ``name`` fills."""
    mount = f"grpo.mount({name!r}, element.querySelector('.g-mount'))"
    # Gradio may draw the page before our script has arrived.
    script = f"(function begin() {{ typeof grpo !== 'undefined' && grpo.mount ? {mount} : setTimeout(begin, 20); }})()"
    return gr.HTML(html_template='<div class="g-mount"></div>', js_on_load=script, apply_default_css=False, **options)


def build_app(store: Store, worker: Worker, login: tuple[str, str] | None = None, *, any_host: bool = False) -> Any:
    """The ASGI app. ``worker`` is warmed up once it serves, and closed with it.

    Args:
        store: open for writing.
        worker: of the same store.
        login: (user, password) every request must bring.
        any_host: answer whatever the Host header says; see `Guard`.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    app = FastAPI(lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    context = Context(store, worker)
    app.include_router(_shell(context))
    for _, _, screen in SCREENS:
        app.include_router(screen.routes(context), prefix="/grpo")
    app.include_router(microscope.routes(context), prefix="/grpo")
    gr.mount_gradio_app(
        app, build_page(), path="/", theme=_theme(), head=_head(), footer_links=[], run_history=False,
        ssr_mode=False, enable_monitoring=False, mcp_server=False, pwa=False, show_error=False,
        favicon_path=str(STATIC / "icon.svg"),
    )  # fmt: skip
    return Guard(app, login, any_host=any_host)


def _theme() -> gr.themes.Base:
    return gr.themes.Base(font=list(FONTS), font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"])


def _head() -> str:
    """Our style and script. Gradio adds them to the page itself, in no order: so it is one file of each kind."""
    return "\n".join(
        (
            f'<link rel="stylesheet" href="/grpo/static/app.css?v={_digest(_bundle("css"))}">',
            f'<script src="/grpo/static/app.js?v={_digest(_bundle("js"))}"></script>',
        )
    )


@lru_cache
def _bundle(kind: str) -> bytes:
    """All files of ``static/`` of one kind: what is shared, then each screen's parts before the screen itself."""
    names = ["style"] if kind == "css" else ["core", "shell", "charts"]
    for name in ("microscope", *(name for name, _, _ in SCREENS)):
        names += [*sorted(path.stem for path in STATIC.glob(f"{name}-*.{kind}")), name]
    files = [path for name in names if (path := STATIC / f"{name}.{kind}").is_file()]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return (text + ("\ngrpo.ready = true;\n" if kind == "js" else "")).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


@lru_cache
def _plotly() -> bytes:
    """plotly.js as the plotly package ships it, compressed once."""
    import importlib.util

    found = importlib.util.find_spec("plotly")
    assert found is not None and found.submodule_search_locations
    source = Path(found.submodule_search_locations[0]) / "package_data" / "plotly.min.js"
    return gzip.compress(source.read_bytes(), 6)


def _shell(context: Context) -> APIRouter:
    """What all screens share: the pulse, static files, pictures."""
    router = APIRouter(prefix="/grpo", route_class=PlainRoute)

    @router.get("/pulse")
    def pulse() -> Response:
        """One small answer a second for every watching page."""
        runs = [
            {"id": run.id, "name": run.name, "number": run.number, "state": run.state, "step": run.step,
             "total": run.total_steps}
            for run in context.store.active_runs()
        ]  # fmt: skip
        return answer({"revision": context.store.revision(), "active": runs, "worker": context.worker.status()})

    @router.get("/static/plotly.min.js")
    def plotly() -> Response:
        headers = {"Content-Encoding": "gzip", "Cache-Control": "public, max-age=31536000, immutable"}
        return Response(_plotly(), media_type="text/javascript", headers=headers)

    @router.get("/static/app.{kind}")
    def bundle(kind: Literal["js", "css"]) -> Response:
        media = {"js": "text/javascript", "css": "text/css"}[kind]
        headers = {"Cache-Control": "public, max-age=31536000, immutable"}  # its address changes with its content
        return Response(_bundle(kind), media_type=media, headers=headers)

    @router.get("/static/icon.svg")
    def icon() -> Response:
        return FileResponse(STATIC / "icon.svg", headers={"Cache-Control": "public, max-age=86400"})

    @router.get("/pictures/{path:path}")
    def picture(path: str) -> Response:
        """A recorded picture: only image files in a run's image folders are ever served."""
        try:
            if len(path) > LONGEST_PATH or not _PICTURE.fullmatch(path):
                raise StoreError("not a picture's path")
            file = context.store.file(path)  # links followed: what they lead to must be a picture too
            if not _PICTURE.fullmatch(file.relative_to(context.store.root.resolve()).as_posix()):
                raise StoreError("a link that leaves the pictures")
            found = file.is_file()
        except (StoreError, OSError):
            found = False
        if not found:
            raise Refused("There is no such picture.", status=404)
        return FileResponse(file, headers={"Cache-Control": "private, max-age=86400"})

    return router
