"""Clients that disconnect before they have their answer."""

import asyncio
from contextlib import suppress
from typing import Any, final


@final
class Departures:
    """An ASGI middleware that cancels the work on a request when its client disconnects.

    A server notices this only while it streams. Otherwise it would compute an answer that nobody reads.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        body = [await receive()]
        while body[-1].get("more_body"):
            body.append(await receive())
        gone = asyncio.ensure_future(receive())  # after the body, the only message is that the client has disconnected

        async def replay() -> Any:
            return body.pop(0) if body else await asyncio.shield(gone)

        served = asyncio.ensure_future(self.app(scope, replay, send))
        try:
            await asyncio.wait({served, gone}, return_when=asyncio.FIRST_COMPLETED)
            if served.done():
                return await served
            served.cancel()
            with suppress(asyncio.CancelledError):
                await served
        finally:
            served.cancel()
            gone.cancel()
