"""Best fit against a brute-force oracle, and what a row may and may not be, for any lengths."""

from collections import Counter

import pytest
from hypothesis import given, strategies as st

from nanochat.data.packing import BestFitPool, fill_row, fill_row_whole

lengths_lists = st.lists(st.integers(2, 40), min_size=1, max_size=60)


class BruteForcePool:
    """The same rules by looking at every item."""

    def __init__(self):
        self.items = []  # (length, age)

    def add(self, length, age):
        self.items.append((length, age))

    def pop_oldest(self):
        return self.pop(min(self.items, key=lambda item: item[1]))

    def pop_best(self, space):
        fitting = [item for item in self.items if item[0] <= space]
        return self.pop(max(fitting, key=lambda item: (item[0], -item[1]))) if fitting else None

    def pop_longest(self):
        return self.pop(max(self.items, key=lambda item: (item[0], -item[1])))

    def pop(self, item):
        self.items.remove(item)
        return item


operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 12)),
        st.tuples(st.just("best"), st.integers(0, 14)),
        st.tuples(st.sampled_from(["oldest", "longest"]), st.just(0)),
    ),
    max_size=120,
)


@given(operations)
def test_every_answer_of_the_pool_is_the_brute_force_one(steps):
    pool, oracle = BestFitPool(), BruteForcePool()
    for number, (what, value) in enumerate(steps):
        if what == "add":
            pool.add(value, number)
            oracle.add(value, number)
        elif what == "best":
            assert pool.pop_best(value) == oracle.pop_best(value)
        elif oracle.items:
            assert getattr(pool, f"pop_{what}")() == getattr(oracle, f"pop_{what}")()
        assert len(pool) == len(oracle.items)
        assert pool.total == sum(length for length, _ in oracle.items)
        assert pool.items() == sorted(age for _, age in oracle.items)


def test_a_worked_example():
    # 10 to fill: the oldest (4), then 5 leaves 1. Next: 3, 6 leaves 1. Next: 9 leaves 1. Then 7 and nothing more.
    pool = BestFitPool()
    for length in (4, 3, 9, 5, 6, 7):
        pool.add(length, length)
    assert [fill_row_whole(pool, 10) for _ in range(5)] == [[4, 6], [3, 7], [9], [5], []]


def test_the_search_is_sublinear():
    """A thousand times the items may not cost a thousand times the comparisons."""

    class Counted(int):
        compared = 0

        def __lt__(self, other):
            Counted.compared += 1
            return int(self) < int(other)

    pool = BestFitPool()
    for length in range(1, 20_001):
        pool.add(Counted(length), None)
    Counted.compared = 0
    for space in range(100, 20_000, 200):
        pool.pop_best(space)
    assert Counted.compared < 100 * 3 * 20


def pack(lengths, capacity, num_rows, pool_size):
    """Rows of (document, start, length, taken) from an endless repetition of `lengths`, tails put back.

    With them what is still waiting, and for each piece the row before which it came and the pieces before it.
    """
    pool, entered, given_out, rows = BestFitPool(), {}, 0, []

    def add(length, document, start):
        entered[document, start] = (len(rows), len(pool))
        pool.add(length, (document, start))

    def refill():
        nonlocal given_out
        while len(pool) < pool_size:
            add(lengths[given_out % len(lengths)], given_out, 1)  # token 0 is the bos
            given_out += 1

    for _ in range(num_rows):
        refill()
        row = []
        for (document, start), length, taken in fill_row(pool, capacity, refill):
            row.append((document, start, length, taken))
            if taken < length:
                add(length - taken + 1, document, start + taken - 1)
        rows.append(row)
    return rows, pool.items(), entered


@given(lengths_lists, st.integers(3, 30), st.integers(1, 30), st.integers(1, 20))
def test_rows_without_gaps(lengths, capacity, num_rows, pool_size):
    rows, left, entered = pack(lengths, capacity, num_rows, pool_size)
    for row in rows:
        total = sum(taken for *_, taken in row)
        assert total == capacity or (total == capacity - 1 and row[-1][2] == row[-1][3])
        assert all(taken == length for _, _, length, taken in row[:-1]), "only the last piece may be cropped"
        assert all(taken >= 2 for *_, taken in row), "a piece is at least its bos and one token"
    # Every token of every document that went in is in exactly one row or still waiting.
    seen = Counter((document, start + i) for row in rows for document, start, _, taken in row for i in range(taken - 1))
    for document, start in left:
        seen.update((document, i) for i in range(start, lengths[document % len(lengths)]))
    expected = {(d, i) for d, _ in entered for i in range(1, lengths[d % len(lengths)])}
    assert set(seen) == expected
    assert set(seen.values()) <= {1}


@given(lengths_lists, st.integers(3, 30), st.integers(1, 20))
def test_nothing_starves(lengths, capacity, pool_size):
    rows, left, entered = pack(lengths, capacity, 60, pool_size)
    row_of = {(document, start): number for number, row in enumerate(rows) for document, start, *_ in row}
    row_of |= dict.fromkeys(left, len(rows))
    assert set(row_of) == set(entered)
    for piece, (row, before) in entered.items():  # it may have come while its row was being filled: one more
        assert row_of[piece] <= row + before + 1


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_whole_rows(lengths, capacity):
    pool = BestFitPool()
    for number, length in enumerate(lengths):
        pool.add(length, number)
    rows = []
    while row := fill_row_whole(pool, capacity):
        rows.append(row)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    waiting = set(range(len(lengths)))
    for row in rows:
        assert row[0] == min(waiting), "the oldest starts the row"
        waiting -= set(row)
        space = capacity - sum(lengths[number] for number in row)
        assert space >= 0
        assert not any(lengths[number] <= space for number in waiting), "there was room for another"


def test_an_item_longer_than_the_row_is_a_bug_not_an_endless_loop():
    pool = BestFitPool()
    pool.add(11, "too long")
    with pytest.raises(AssertionError, match=r"11.*10"):
        fill_row_whole(pool, 10)
