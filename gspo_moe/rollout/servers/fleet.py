"""All rollout servers of a run as one process reaches them, by HTTP, in a thread of its own.

Each Ask goes to the server with the fewest under way of those that are up. What fails is asked again, elsewhere where
it can be, after a pause that doubles. A server that cannot be reached is out, and what it had goes to others, until it
is healthy again and has the newest weights: those that a folder brings are given to it at once, for others it waits
until the next sync. Invariant: one coroutine has an Ask from its submission to its only answer.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from gspo_moe.config.rollout import ServersConfig
from gspo_moe.errors import RolloutError
from gspo_moe.packages import require
from gspo_moe.rollout.servers.counters import Counters
from gspo_moe.rollout.servers.labels import policy_version
from gspo_moe.rollout.servers.link import Link, open_session
from gspo_moe.rollout.servers.records import Answer, Ask, BadAnswer, Dialect, Post, ServerDown

T = TypeVar("T")
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds, before an Ask is asked again
HEALTH_SECONDS = 10.0  # for an answer; a server's HTTP side is free while it computes


class Fleet:
    """`Servers`. options.concurrency: of the Asks of this process. Raises ConfigError where aiohttp is missing."""

    def __init__(self, options: ServersConfig, dialect: Dialect) -> None:
        require("aiohttp")
        self._options, self._dialect = options, dialect
        self._weights: list[Post] = []  # that all servers were told last, of one version
        self._version: int | None = None
        self._syncs = self._syncing = False  # this process gives weights; it does so now
        self._dark_since = 0.0  # where no server is up
        now = time.monotonic()
        self._counters = Counters(since=now, began=now)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout servers", daemon=True)
        self._thread.start()
        self._session = self._wait(open_session())
        self._links, self._changed = self._wait(self._open(options.urls))
        self._watch = asyncio.run_coroutine_threadsafe(self._look_after(), self._loop)

    @property
    def up(self) -> int:
        return sum(link.up for link in self._links)

    def begin_sync(self) -> int:
        return self._wait(self._begin_sync())

    def submit(self, ask: Ask) -> Future[Answer]:
        return asyncio.run_coroutine_threadsafe(self._answered(ask), self._loop)

    def everywhere(self, post: Post) -> list[Any]:
        return self._wait(self._everywhere(post))

    def each(self, posts: Sequence[Post]) -> list[Any]:
        return self._wait(self._each(posts))

    def expect(self, version: int) -> None:
        self._wait(self._expect(version))

    def wait_until_up(self, seconds: float) -> dict[str, str]:
        """Waits until every server is healthy: by URL, why each is not that is not by then."""
        return self._wait(self._all_up(seconds))

    def take_counters(self) -> Counters:
        """Of what has been since the last call."""
        return self._wait(self._take_counters())

    def close(self) -> None:
        """Gives up what is under way."""
        if self._loop.is_closed():
            return
        self._wait(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self, urls: Sequence[str]) -> tuple[list[Link], asyncio.Condition]:
        return [Link(url.rstrip("/"), self._session) for url in urls], asyncio.Condition()

    async def _shut(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._session.close()

    async def _take_counters(self) -> Counters:
        self._counters.advance(time.monotonic())
        taken, self._counters = self._counters, self._counters.successor()
        return taken

    async def _answered(self, ask: Ask) -> Answer:
        start, failures, last = time.monotonic(), 0, None
        while True:
            link = await self._take(last)
            try:
                answer = await self._asked(link, ask)
                break
            except (BadAnswer, ServerDown) as fault:
                failures, last = failures + 1, link
                if failures > self._options.retries:
                    raise RolloutError(
                        f"{fault}; asked {failures} times, as rollout.servers.retries={self._options.retries} has it, "
                        f"the last time of {link.url}"
                    ) from None
                self._counters.retries += 1
                if isinstance(fault, BadAnswer) and failures > 1:  # as the same random numbers would give again
                    ask = replace(ask, params=replace(ask.params, seed=f"{ask.params.seed}/again"))
            finally:
                await self._give_back(link)
            await asyncio.sleep(min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE))
        self._counters.came(len(answer.token_ids), time.monotonic() - start)
        return replace(answer, version=policy_version(answer.version)) if answer.token_ids else answer

    async def _asked(self, link: Link, ask: Ask) -> Answer:
        oldest = self._version
        try:
            body = await link.send_while_up(self._dialect.ask(ask), self._options.timeout_seconds)
            answer = self._dialect.answer(ask, body)
            if answer.token_ids and oldest is not None and answer.version < oldest:
                raise ServerDown(f"{link.url} answers with weights of version {answer.version}, and {oldest} is out")
        except ServerDown as fault:
            await self._take_out(link, fault)
            raise
        return answer

    async def _take(self, last: Link | None) -> Link:
        """The least loaded of those that are up, another than the last one where there is another.

        Raises RolloutError once no server has been up for `outage` seconds.
        """
        async with self._changed:
            most = self._options.concurrency
            while not (free := [one for one in self._links if one.current and one.under_way < most]):
                try:
                    await asyncio.wait_for(self._changed.wait(), self._patience())
                except TimeoutError:
                    raise RolloutError(
                        f"no rollout server has been up for {self._options.outage_seconds:g} s ({self._faults()}); "
                        "start them again, and the run goes on from its last whole step"
                    ) from None
            link = min(free, key=lambda one: (one is last, one.under_way))
            link.under_way += 1
        self._counters.begin(time.monotonic())
        return link

    async def _give_back(self, link: Link) -> None:
        self._counters.end(time.monotonic())
        link.under_way -= 1  # before anything that a cancelled Ask leaves undone
        async with self._changed:
            self._changed.notify_all()

    async def _everywhere(self, post: Post) -> list[Any]:
        if post.version is not None:
            if self._weights and self._weights[-1].version != post.version:
                self._weights.clear()
            self._weights.append(post)
        return await self._each([post] * self.up)

    async def _each(self, posts: Sequence[Post]) -> list[Any]:
        links = [link for link in self._links if link.up]
        if len(links) != len(posts) or not links:
            raise RolloutError(
                f"{len(links)} of {len(self._links)} rollout servers are up ({self._faults()}), and "
                f"{len(posts) or 'some'} were to be told of something; start them again"
            )
        found = await asyncio.gather(*map(self._told, links, posts), return_exceptions=True)
        took = any(not isinstance(one, BaseException) for one in found)
        for link, post, one in zip(links, posts, found, strict=True):
            alone = isinstance(one, BadAnswer) and post.version is not None and took  # others could load the weights
            if isinstance(one, RolloutError) and (alone or post.or_out):
                await self._take_out(link, one)
            elif isinstance(one, BaseException) and not isinstance(one, ServerDown):
                raise one
        if not self.up:
            raise RolloutError(f"no rollout server is up any more ({self._faults()}); start them again")
        return [one for one in found if not isinstance(one, RolloutError)]

    async def _told(self, link: Link, post: Post) -> Any:
        try:
            async with link.loading:
                return await link.send(post, post.seconds or self._options.timeout_seconds)
        except ServerDown as fault:
            await self._take_out(link, fault)
            raise

    async def _begin_sync(self) -> int:
        self._syncs = self._syncing = True
        waiting = [link for link in self._links if link.waits]
        for link in waiting:
            link.let_in(current=False)
        return len(waiting)

    async def _expect(self, version: int) -> None:
        async def check(link: Link) -> None:
            try:
                await self._has(link, version)
                link.current = True
            except RolloutError as fault:
                await self._take_out(link, fault)

        self._version, self._syncing = version, False
        await asyncio.gather(*(check(link) for link in self._links if link.up))
        async with self._changed:
            self._changed.notify_all()

    async def _has(self, link: Link, newest: int) -> None:
        """Raises ServerDown where the server has other weights."""
        version = self._dialect.version(await link.send(self._dialect.weights(), HEALTH_SECONDS))
        if version != newest:
            link.waits = True
            raise ServerDown(f"{link.url} has weights of version {version}, and {newest} is out")

    async def _look_after(self) -> None:
        async def again_and_again(link: Link) -> None:
            while True:
                await asyncio.sleep(self._options.health_seconds)
                await self._look_at(link)

        await asyncio.gather(*map(again_and_again, self._links))

    async def _look_at(self, link: Link) -> None:
        """Lets a healthy server in, once it has the newest weights, and takes out one that is not healthy."""
        if link.loading.locked():
            return
        healthy = False
        try:
            await link.send(self._dialect.health(), HEALTH_SECONDS)
            healthy = True
            if link.up:
                return
            async with link.loading:
                await self._catch_up(link)
        except RolloutError as fault:
            link.waits = link.waits and healthy
            await self._take_out(link, fault)
            return
        link.let_in()
        async with self._changed:
            self._changed.notify_all()

    async def _catch_up(self, link: Link) -> None:
        """Raises ServerDown where it has other weights than the newest, and this process cannot give it those now."""
        dialect, posts, newest = self._dialect, list(self._weights), self._version
        if self._syncing:
            link.waits = True
            raise ServerDown(f"{link.url} waits until all servers have the next weights")
        if posts:
            for post in (dialect.pause(), *posts, dialect.resume()):
                await link.send(post, self._options.timeout_seconds)
        elif newest is not None:
            await self._has(link, newest)
            if self._syncs:
                await link.send(dialect.resume(), HEALTH_SECONDS)
        if self._syncing or (self._weights, self._version) != (posts, newest):
            raise ServerDown(f"{link.url} has weights that others follow meanwhile")

    async def _take_out(self, link: Link, fault: Exception) -> None:
        if not link.take_out(str(fault)):
            return
        self._counters.taken_out += 1
        if not self.up:
            self._dark_since = time.monotonic()
        async with self._changed:
            self._changed.notify_all()  # who waits for a place waits for a server now

    def _patience(self) -> float | None:
        """Seconds that one may still wait for a server; without end while there is one."""
        return None if self.up else self._dark_since + self._options.outage_seconds - time.monotonic()

    async def _all_up(self, seconds: float) -> dict[str, str]:
        deadline = time.monotonic() + seconds
        while True:
            await asyncio.gather(*map(self._look_at, self._links))
            down = {link.url: link.why for link in self._links if not link.up}
            if not down or time.monotonic() > deadline:
                return down
            await asyncio.sleep(min(1.0, seconds))

    def _faults(self) -> str:
        return "; ".join(link.why for link in self._links if not link.up)
