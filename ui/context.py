"""What every screen is given: the database, the worker, and how to answer a browser."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException  # FastAPI's own, and what it raises itself for a body it can't read

from grpo_engine.config import ConfigError
from grpo_engine.store import Store, StoreError

from .worker import EngineUnavailable, Worker

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)


@dataclass
class Context:
    """The app's parts, shared by all screens.

    Attributes:
        store: the database, open for writing; every method is safe from any thread.
        worker: the engine behind the screens: starts runs, loads models for the playground.
    """

    store: Store
    worker: Worker


class Body(BaseModel):
    """What a page sends: nothing beyond the fields is accepted."""

    model_config = ConfigDict(extra="forbid")


class Refused(Exception):
    """A request that can't be granted: one sentence for the person at the browser.

    ``field`` names the setting it is about, ``status`` the HTTP status.
    """

    def __init__(self, sentence: str, *, field: str = "", status: int = 409) -> None:
        super().__init__(sentence)
        self.field, self.status = field, status


class PlainRoute(APIRoute):
    """A route whose every failure is one JSON sentence ``{"error": ..., "field": ...}``; tracebacks go to the log."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """FastAPI's handler, with what it raises turned into answers."""
        original = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                answer: Response = await original(request)
                return answer
            except Refused as error:
                return _sentence(str(error), error.status, error.field)
            except EngineUnavailable as error:
                return _sentence(str(error), 503)
            except StoreError as error:
                return _sentence(str(error), 404 if "There is no run" in str(error) else 409)
            except ConfigError as error:
                return _sentence(str(error), 422)
            except RequestValidationError as error:
                return _sentence(_invalid(error), 422)
            except HTTPException as error:
                return _sentence(str(error.detail), error.status_code)
            except Exception:  # the last line of defence between a bug and a person's screen
                log.exception("%s %s failed", request.method, request.url.path)
                return _sentence("Something went wrong inside the app; the details are in its log.", 500)

        return handler


def _sentence(text: str, status: int, field: str = "") -> Response:
    return JSONResponse({"error": text, "field": field}, status_code=status)


def _invalid(error: RequestValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first.get("loc", ()) if part not in ("body", "query", "path"))
    return f"The request can't be read: {where + ': ' if where else ''}{first.get('msg', 'it is malformed')}."


def answer(data: Any) -> Response:
    """Plain data as JSON; NaN and infinite numbers become null, as browsers can't read them."""
    text = json.dumps(finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text, media_type="application/json", headers={"Cache-Control": "no-store"})


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities replaced by None, tuples and arrays by lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if hasattr(value, "tolist"):
        return finite(value.tolist())
    return value


def column(values: NDArray[Any]) -> list[float | None]:
    """A column of numbers for a chart: six significant digits are more than a screen shows."""
    return [None if value != value else float(f"{value:.6g}") for value in values.tolist()]
