"""Whose turn it is: clients that wait are served in turn, each one's own requests in the order they came.

So a client with a thousand requests delays another one's by one request, not by a thousand.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")  # hashable, and each waits once


class FairQueue(Generic[T]):
    """Not for several threads at once. Everything but counting and going through it takes the same time however many
    wait: one request may be of hundreds of orders."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, OrderedDict[T, None]] = OrderedDict()  # by client; whose turn is next stands first

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[T]:
        for items in self._of.values():
            yield from items

    def add(self, client: str, item: T) -> None:
        self._of.setdefault(client, OrderedDict())[item] = None

    def take(self) -> T:
        """The next one, of the client whose turn it is; that client then stands behind the others."""
        client, items = self._of.popitem(last=False)
        item, _ = items.popitem(last=False)
        if items:
            self._of[client] = items
        return item

    def remove(self, client: str, item: T) -> bool:
        """Take `item` out, if it still waits; whether it did."""
        items = self._of.get(client)
        if items is None or item not in items:
            return False
        del items[item]
        if not items:
            del self._of[client]
        return True

    def clear(self) -> None:
        self._of.clear()
