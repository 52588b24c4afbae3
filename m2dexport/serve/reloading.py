"""A new bundle in the place of the one that is served, without a request dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from m2dexport.errors import M2DError
from m2dexport.serve.app import Service
from m2dexport.serve.served import Identity, Served, identity_of

_LOOK_EVERY_S = 1.0


class Reloading:
    """Loads the bundle again when it is told to, or when its file was replaced.

    Args:
        service: what serves it.
        path: the bundle.
        opened: verifies and loads it.
        allow_new_space: whether the new bundle's vectors may be of another space, so that they must
            not be compared with those that clients have stored.
        on_news: called with a sentence about every attempt.
    """

    def __init__(
        self,
        service: Service,
        path: Path,
        opened: Callable[[], Served],
        allow_new_space: bool,
        on_news: Callable[[str], None],
    ) -> None:
        self._service = service
        self._path = path
        self._opened = opened
        self._allow_new_space = allow_new_space
        self._on_news = on_news
        self._one_at_a_time = asyncio.Lock()

    async def reload(self) -> None:
        """Verify and load the bundle; requests that come then get its vectors.

        Requests that came before are answered by the bundle that they were tokenized for. Where
        anything is wrong with the new one, the old one stays.
        """
        metrics, path = self._service.metrics, self._path
        async with self._one_at_a_time:
            try:
                served = await asyncio.to_thread(self._opened)
                self._require_space(served)
            except (M2DError, OSError) as error:
                metrics.reloads.labels("refused").inc()
                reason = (isinstance(error, OSError) and error.strerror) or error
                self._on_news(f"{path} was not loaded, and the old one stays: {reason}")
                return
            self._service.serve(served)
            metrics.reloads.labels("loaded").inc()
            self._on_news(f"{path} was loaded again, space {served.space_id}")

    async def watch(self) -> None:
        """Reload whenever the file was replaced, once it has stopped changing; until cancelled."""
        tried = last = self._identity()
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            now = self._identity()
            if now == last and now not in (None, tried, self._service.served.identity):
                tried = now
                await self.reload()
            last = now

    def _identity(self) -> Identity | None:
        try:
            return identity_of(self._path)
        except OSError:  # between the removal of one and the arrival of another
            return None

    def _require_space(self, served: Served) -> None:
        old = self._service.served.space_id
        if served.space_id != old and not self._allow_new_space:
            raise M2DError(
                f"it is of space {served.space_id}, and clients have vectors of {old}, which must "
                "not be compared with its; --allow-new-space serves it all the same."
            )
