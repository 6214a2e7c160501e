"""Best-fit packing: which items share a row, by length alone.

Best fit takes the longest item that still fits. Alone it could pass over an item of awkward length for ever, so every
row starts with the oldest item: one with n others before it is in a row after at most n + 1 rows, whatever arrives
meanwhile.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

MIN_LENGTH = 2  # tokens of an item: bos and one of the document's


class BestFitPool(Generic[Item]):
    """Items by length and by age. Every operation searches in O(log n). Of equal lengths, the older item is taken."""

    def __init__(self) -> None:
        self._items: OrderedDict[int, Item] = OrderedDict()  # by age, oldest first
        self._length: dict[int, int] = {}  # by age
        self._lengths: list[tuple[int, int]] = []  # (length, -age), sorted: of equal lengths the oldest is last
        self._next_age = 0
        self.total = 0  # sum of the lengths

    def __len__(self) -> int:
        return len(self._items)

    def items(self) -> list[Item]:
        """All items, oldest first. Adding them to an empty pool in this order gives an equal pool."""
        return list(self._items.values())

    def add(self, length: int, item: Item) -> None:
        """Add an item, as the youngest."""
        assert length > 0
        self._items[self._next_age], self._length[self._next_age] = item, length
        insort(self._lengths, (length, -self._next_age))
        self._next_age += 1
        self.total += length

    def pop_oldest(self) -> tuple[int, Item]:
        """Remove and return the oldest item: (length, item)."""
        return self._pop(next(iter(self._items)))

    def pop_best(self, space: int) -> tuple[int, Item] | None:
        """Remove and return the longest item of at most `space`, or None if nothing fits."""
        end = bisect_left(self._lengths, (space + 1,))
        return self._pop(-self._lengths[end - 1][1]) if end else None

    def pop_longest(self) -> tuple[int, Item]:
        """Remove and return the longest item."""
        return self._pop(-self._lengths[-1][1])

    def _pop(self, age: int) -> tuple[int, Item]:
        item, length = self._items.pop(age), self._length.pop(age)
        del self._lengths[bisect_left(self._lengths, (length, -age))]
        self.total -= length
        return length, item


def fill_row(pool: BestFitPool[Item], capacity: int, refill: Callable[[], None]) -> Iterator[tuple[Item, int, int]]:
    """A row without gaps: yields (item, length, taken), where taken < length means that the item was cropped.

    The oldest item starts the row, then best fit; when nothing fits, the longest is cropped to the space left. Only
    the last item can be cropped, and the caller puts back its rest. `refill` is called when the pool is empty and must
    add to it. The sum of `taken` is the capacity, or one less: a space of one holds no item, only the bos after the
    last one.
    """
    space = capacity
    while space >= MIN_LENGTH:
        if not pool:
            refill()
        fitting = pool.pop_oldest() if space == capacity else pool.pop_best(space)
        length, item = fitting or pool.pop_longest()
        taken = min(length, space)
        space -= taken
        yield item, length, taken


def fill_row_whole(pool: BestFitPool[Item], capacity: int) -> list[Item]:
    """A row of whole items, gaps allowed: the oldest, then best fit until nothing fits. Empty for an empty pool.

    No item in the pool may be longer than the capacity.
    """
    row: list[Item] = []
    space = capacity
    fitting = pool.pop_oldest() if pool else None
    while fitting is not None:
        length, item = fitting
        space -= length
        assert space >= 0, f"an item of {length} in a row of {capacity}"
        row.append(item)
        fitting = pool.pop_best(space)
    return row
