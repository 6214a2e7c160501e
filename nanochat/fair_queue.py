"""Whose turn it is: clients that wait are served in turn, each one's own requests in the order they came.

So a client with a thousand requests delays another one's by one request, not by a thousand.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Not for several threads at once."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[T]] = OrderedDict()  # by client; whose turn is next stands first

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[T]:
        for items in self._of.values():
            yield from items

    def add(self, client: str, item: T) -> None:
        self._of.setdefault(client, deque()).append(item)

    def take(self) -> T:
        """The next one, of the client whose turn it is; that client then stands behind the others."""
        client, items = self._of.popitem(last=False)
        item = items.popleft()
        if items:
            self._of[client] = items
        return item

    def remove(self, client: str, item: T) -> None:
        """Take `item` out, if it still waits."""
        items = self._of.get(client, deque())
        if item in items:
            items.remove(item)
            if not items:
                del self._of[client]

    def clear(self) -> None:
        self._of.clear()
