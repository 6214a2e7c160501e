"""A queue that serves clients in turn, and each client's own items in the order they came.

A client with a thousand waiting requests so delays another client's by one request, not by a thousand.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")  # hashable; an item is in the queue at most once


class FairQueue(Generic[T]):
    """Not thread-safe. `add`, `take` and `remove` take constant time: one HTTP request may be of hundreds of items."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, OrderedDict[T, None]] = OrderedDict()  # by client, in the order of their turns

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[T]:
        for items in self._of.values():
            yield from items

    def add(self, client: str, item: T) -> None:
        self._of.setdefault(client, OrderedDict())[item] = None

    def take(self) -> T:
        """Remove and return an item of the client whose turn it is; its next turn comes after the other clients'."""
        client, items = self._of.popitem(last=False)
        item, _ = items.popitem(last=False)
        if items:
            self._of[client] = items
        return item

    def remove(self, client: str, item: T) -> None:
        """Remove `item`, if it is in the queue."""
        items = self._of.get(client, OrderedDict())
        items.pop(item, None)
        if not items:
            self._of.pop(client, None)

    def clear(self) -> None:
        self._of.clear()
