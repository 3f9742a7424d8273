"""Many calls at once, each result as soon as it is there: how one continuous batch is kept full from outside."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

__all__ = ["in_flight"]

T = TypeVar("T")
R = TypeVar("R")


def in_flight(work: Sequence[T], do: Callable[[T], R], n: int) -> Iterator[tuple[T, R]]:
    """(item, result) as they finish, never more than `n` begun and unfinished.

    The first call that raises ends it: what runs is waited for and dropped, nothing more is begun.
    """
    if n == 1:
        for item in work:
            yield item, do(item)
        return
    todo = iter(work)
    with ThreadPoolExecutor(n) as pool:
        running: dict[Future[R], T] = {pool.submit(do, item): item for item in islice(todo, n)}
        try:
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    item = running.pop(future)
                    for following in islice(todo, 1):
                        running[pool.submit(do, following)] = following
                    yield item, future.result()
        finally:
            for future in running:
                future.cancel()
