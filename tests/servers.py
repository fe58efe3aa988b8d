"""Rollout servers in the tests' own process, which answer with what they are told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from gspo_moe.rollout.servers.records import Answer, Ask, Post
from gspo_moe.rollout.servers.transfers import VllmTransfer

Handler = Callable[[int, Post], Any]


def nothing(number: int, post: Post) -> Any:
    raise NotImplementedError


class Servers:
    """`Servers` whose requests go to `handle(number of the server, request)`; `posts` has the paths, in order.

    Who asks it for answers gives it a `submit`.
    """

    def __init__(self, handle: Handler = nothing, count: int = 1) -> None:
        self._handle, self.up = handle, count
        self.posts: list[str] = []
        self.expected: list[int] = []

    def begin_sync(self) -> int:
        return 0

    def submit(self, ask: Ask) -> Future[Answer]:
        raise NotImplementedError

    def everywhere(self, post: Post) -> list[Any]:
        return self.each([post] * self.up)

    def each(self, posts: Sequence[Post]) -> list[Any]:
        self.posts.append(posts[0].path)
        return [self._handle(number, post) for number, post in enumerate(posts)]

    def expect(self, version: int) -> None:
        self.expected.append(version)

    def close(self) -> None: ...


class PlainDialect:
    """Posts named for what they ask; an answer's body is the Answer."""

    name = "plain"

    def ask(self, ask: Ask) -> Post:
        return Post("/ask", {"ask": ask})

    def answer(self, ask: Ask, body: Any) -> Answer:
        assert isinstance(body, Answer)
        return body

    def pause(self) -> Post:
        return Post("/pause", {})

    def resume(self) -> Post:
        return Post("/resume", {})

    def load_folder(self, folder: str, version: int) -> tuple[Post, ...]:
        return (Post("/load", {"folder": folder, "version": version}), Post("/label", {"version": version}))


TRANSFER = VllmTransfer()


class NoProbe:
    def check(self, model: Any, version: int) -> float:
        return 0.0
