"""The admin plane's front: FastAPI is imported with the first request, so that a gateway without one stays small."""

from __future__ import annotations

from typing import Any

from router.api.data_plane import Receive, Scope, Send


class LazyAdminPlane:
    """An ASGI application that builds the real one (`router/api/admin.py`) when it is first asked."""

    def __init__(self, **parts: Any) -> None:
        self._parts = parts
        self._application: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._application is None:
            from router.api.admin import application

            self._application = application(**self._parts)
        await self._application(scope, receive, send)
