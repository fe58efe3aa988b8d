"""One rollout server as this process reaches it: HTTP with JSON, and what its faults mean."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from gspo_moe.errors import RolloutError
from gspo_moe.rollout.servers.records import BadAnswer, Post, ServerDown

if TYPE_CHECKING:
    import aiohttp

BUSY = frozenset({408, 425, 429})  # of HTTP's 4xx, those which another time may go well
SHOWN = 500  # characters of what a server said
KEEP_ALIVE = 2.0  # seconds; servers close idle connections after 5, perhaps just as a request is on its way


async def open_session() -> aiohttp.ClientSession:
    import aiohttp

    # How many requests there are is the caller's to limit, and each has its own time.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


class Link:
    """up: it is told of what all are told. current: Asks go there, too. waits: it is healthy and has older weights.

    under_way: how many Asks. why: of its last fault. gone: set when it goes down. loading: held while it is told.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.up = self.current = True
        self.waits = False
        self.under_way = 0
        self.why = ""
        self.gone = asyncio.Event()
        self.loading = asyncio.Lock()
        self._session = session

    def take_out(self, why: str) -> bool:
        """Whether it was up."""
        was, self.up, self.current, self.why = self.up, False, False, why
        self.gone.set()
        return was

    def let_in(self, current: bool = True) -> None:
        self.up, self.current, self.waits, self.gone = True, current, False, asyncio.Event()

    async def send(self, post: Post, seconds: float) -> Any:
        """The JSON, or text, of the answer.

        Raises ServerDown where the server cannot be reached or breaks off, is overloaded (503) or too slow, BadAnswer
        for its other faults and for what is no JSON, RolloutError for what it refuses.
        """
        import aiohttp

        method = "GET" if post.body is None else "POST"
        what = f"{method} {self.url}{post.path}"
        try:
            async with (
                asyncio.timeout(seconds),
                self._session.request(method, self.url + post.path, json=post.body) as response,
            ):
                if response.status == 200 and response.content_type == "application/json":
                    return await response.json()
                text = await response.text()
        except TimeoutError:
            raise ServerDown(f"{what} had no answer for {seconds:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerDown(f"{what} broke off ({type(error).__name__}: {error})") from None
        except ValueError as error:  # JSON's
            raise BadAnswer(f"{what} was answered with what is no JSON ({error})") from None
        if response.status == 200:
            return text
        said = f"{what} was answered with HTTP {response.status}: {text[:SHOWN]}"
        if response.status == 503:
            raise ServerDown(said)
        if response.status >= 500 or response.status in BUSY:
            raise BadAnswer(said)
        raise RolloutError(said)

    async def send_while_up(self, post: Post, seconds: float) -> Any:
        """The same, and ServerDown as soon as the server is taken out."""
        sending = asyncio.ensure_future(self.send(post, seconds))
        leaving = asyncio.ensure_future(self.gone.wait())
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ServerDown(self.why)
            return sending.result()
        finally:
            sending.cancel()
            leaving.cancel()
