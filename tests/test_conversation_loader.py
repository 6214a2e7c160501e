"""The finetuning loader: whole conversations, honest targets, an end, exact resumption."""

import numpy as np
import pytest
import torch

from nanochat.common import SPECIAL_TOKENS, UserError
from nanochat.conversation import render
from nanochat.data import conversation_loader, rendered
from nanochat.data.conversation_loader import ConversationLoader

BOS = 256


class BytesTokenizer:
    """A token a byte, and the special tokens after them."""

    def encode(self, text):
        return list(text.encode("utf-8"))

    def encode_special(self, name):
        return BOS + SPECIAL_TOKENS.index(name)


def chat(*turns):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def chats(count, longest=30, seed=0):
    """One exchange each; the first word of the question is the conversation's number."""
    rng = np.random.default_rng(seed)
    return [chat(f"#{i} " + "?" * rng.integers(0, longest), "!" * rng.integers(0, longest)) for i in range(count)]


def make_loader(dataset, T=96, rows=4, **settings):
    return ConversationLoader(dataset, BytesTokenizer(), sequence_len=T, rows_per_step=rows, **settings)


def take_all(loader, max_batches=10_000):
    batches = []
    try:
        while len(batches) < max_batches:
            batches.append(loader.next_batch())
    except StopIteration:
        pass
    loader.close()
    return batches


def found_conversations(batches):
    """(ids, targets) of every conversation in the batches, in order, as tuples."""
    found = []
    for batch in batches:
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist()):
            starts = [i for i, token in enumerate(inputs) if token == BOS]
            for start, end in zip(starts, [*starts[1:], len(inputs)]):
                if end - start > 1:  # else padding
                    found.append((tuple(inputs[start:end]), tuple(targets[start:end])))
    return found


def expected_conversation(conversation):
    """What must come out, by the renderer: inputs, and as targets the next ids where the mask is 1."""
    ids, mask = render(BytesTokenizer(), conversation)
    return tuple(ids), tuple([t if m else -1 for t, m in zip(ids[1:], mask[1:])])


# ---------------------------------------------------------------------------------------------------
# What rows hold


def test_conversations_come_out_whole_with_the_assistants_words_as_targets():
    dataset = chats(60)
    batches = take_all(make_loader(dataset, T=128))
    found = found_conversations(batches)
    assert len(found) == 60
    want = {}
    for conversation in dataset:
        ids, targets = expected_conversation(conversation)
        want[ids] = targets
    for ids, targets in found:
        # The row may end with the conversation's last id, which then is a target and no input.
        match = ids if ids in want else next(w for w in want if w[:-1] == ids)
        assert targets[: len(match) - 1] == want[match]
        assert set(targets[len(match) - 1 :]) <= {-1}, "what follows a conversation is no target"
        del want[match]
    assert not want


def test_shapes_padding_and_types():
    batch = take_all(make_loader([chat("Hi", "Ho")], T=40))[0]
    assert batch.inputs.shape == batch.targets.shape == (1, 40)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    ids, _ = render(BytesTokenizer(), chat("Hi", "Ho"))
    assert batch.inputs[0].tolist() == ids + [BOS] * (40 - len(ids))
    assert (batch.targets[0] >= 0).sum() == len("Ho") + 1
    assert batch.weights is None and "conversations 0" in batch.origin


def test_a_conversation_that_just_fits_is_not_cropped():
    ids, _ = render(BytesTokenizer(), chat("Hi", "Ho"))
    loader = make_loader([chat("Hi", "Ho")], T=len(ids) - 1)  # a row is T+1 tokens
    batch = take_all(loader)[0]
    assert batch.inputs[0].tolist() == ids[:-1]
    assert batch.targets[0].tolist()[-1] == ids[-1]
    assert loader.stats()["truncated"] == 0


def test_packing_leaves_little_padding():
    loader = make_loader(chats(2000), T=256)
    take_all(loader)
    assert loader.stats()["padded_share"] < 0.03


# ---------------------------------------------------------------------------------------------------
# What does not fit, and what teaches nothing


def test_long_conversations_neither_clog_the_pool_nor_end_in_nan():
    """The field's bug: one that did not fit stayed for ever, every target was masked, the epoch never ended."""
    long_turn = "x" * 200
    dataset = [chat("a", long_turn), *chats(20), chat("one", "1", "two", "2", "three", long_turn), chat(long_turn, "b")]
    loader = make_loader(dataset, T=96, rows=2)
    batches = take_all(loader)
    assert len(batches) < 20
    for batch in batches:
        assert (batch.targets >= 0).any(dim=1).all()
    found = [bytes(i for i in ids if i < 256) for ids, _ in found_conversations(batches)]
    assert len(found) == 21
    assert b"one1two2" in found, "truncated by whole turns"
    assert loader.stats() | {"truncated": 1, "skipped": 2, "conversations": 23} == loader.stats()


def test_no_more_conversations_are_truncated_than_used():
    """Those that wait in the pool count as neither."""
    loader = make_loader([chat(f"a{i}", "b", "c", "d" * 200) for i in range(300)], T=96, rows=4)
    loader.next_batch()
    stats = loader.stats()
    loader.close()
    assert 0 < stats["truncated"] == stats["trained"] < 40


def test_a_conversation_without_an_answer_is_left_out():
    loader = make_loader([chat("anyone?"), chat("hello", "yes")])
    assert len(found_conversations(take_all(loader))) == 1
    assert loader.stats()["skipped"] == 1


@pytest.mark.parametrize("dataset", [[chat("x" * 200, "y")] * 5, [chat("alone")]])
@pytest.mark.parametrize("num_epochs", [1, 3, None])
def test_nothing_usable_is_an_error_not_an_endless_search(dataset, num_epochs):
    with pytest.raises(UserError, match=r"none of [15] .*--max-seq-len"):
        make_loader(dataset, num_epochs=num_epochs).next_batch()


def test_skipped_conversations_in_many_epochs_are_no_error():
    loader = make_loader([chat("x" * 200, "y"), chat("hi", "ho")], num_epochs=4)
    assert len(found_conversations(take_all(loader))) == 4
    assert loader.stats()["skipped"] == 4


def test_mistakes_are_named():
    bad = [*chats(3), {"messages": [{"role": "assistant", "content": "I first"}]}]
    with pytest.raises(UserError, match=r"conversation 4 of 4.*message 1"):
        take_all(make_loader(bad))
    with pytest.raises(UserError, match="--data"):
        make_loader([])
    with pytest.raises(UserError, match="got 0 of"):
        make_loader(chats(1), rows=0)


# ---------------------------------------------------------------------------------------------------
# Epochs and the end


def test_each_epoch_has_every_conversation_once_in_another_order():
    dataset = chats(40)
    one, two = (found_conversations(take_all(make_loader(dataset, T=128, num_epochs=n))) for n in (1, 2))
    assert len(one) == 40 and len(two) == 80
    count = [sum(ids[:7] == expected_conversation(c)[0][:7] for ids, _ in two) for c in dataset[10:]]
    assert set(count) == {2}
    assert [ids for ids, _ in two[:40]] != [ids for ids, _ in two[40:]]


def test_the_end_comes_once_and_stays():
    loader = make_loader(chats(10), num_epochs=1)
    steps = len(take_all(loader))
    for _ in range(2):
        with pytest.raises(StopIteration):
            loader.next_batch()
    assert steps == make_loader(chats(10)).num_steps()


def test_an_endless_loader_goes_on():
    loader = make_loader(chats(10), num_epochs=None)
    batches = take_all(loader, max_batches=30)
    assert len(batches) == 30
    assert loader.stats()["epoch"] > 2
    assert batches[0].read_before == 0 and batches[-1].read_before == len(batches[-1].inputs)


@pytest.mark.parametrize(("rows", "num_epochs"), [(1, 1), (4, 1), (4, 3), (1000, 1)])
def test_num_steps_is_what_comes(rows, num_epochs):
    loader = make_loader(chats(100), rows=rows, num_epochs=num_epochs)
    expected = loader.num_steps()
    batches = take_all(loader)
    assert len(batches) == expected
    assert all(len(batch.inputs) == rows for batch in batches[:-1])


def test_num_steps_of_a_large_data_set_is_estimated(monkeypatch):
    exact = make_loader(chats(3000), rows=2).num_steps()
    monkeypatch.setattr(conversation_loader, "EXACT_CONVERSATIONS", 1000)
    monkeypatch.setattr(conversation_loader, "SAMPLE_CONVERSATIONS", 600)
    assert 0.93 * exact < make_loader(chats(3000), rows=2).num_steps() <= exact, "the data must outlast the steps"


# ---------------------------------------------------------------------------------------------------
# Any world size; resuming


def joined_rows(batches_of_ranks, step):
    """A step's rows from all ranks, in the order of the global batch."""
    world_size = len(batches_of_ranks)
    total = sum(len(batches[step].inputs) for batches in batches_of_ranks)
    return [batches_of_ranks[j % world_size][step].inputs[j // world_size].tolist() for j in range(total)]


@pytest.mark.parametrize("count", [50, 53])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_global_batch_does_not_depend_on_the_world_size(count, world_size):
    alone = take_all(make_loader(chats(count)))
    ranks = [take_all(make_loader(chats(count), rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(alone)}, "all ranks end after the same step"
    for step, batch in enumerate(alone):
        assert joined_rows(ranks, step) == batch.inputs.tolist()


def test_a_rank_may_get_no_row_of_the_last_step():
    loader = make_loader([chat("hi", "ho")], rank=1, world_size=2)
    assert loader.next_batch().inputs.shape == (0, 96)
    loader.close()


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_restored_loader_goes_on_exactly_from_every_step(world_size):
    dataset = [*chats(40), chat("one", "1", "two", "2" * 200), chat("x" * 200, "y")]
    loader = make_loader(dataset, num_epochs=3)
    states, batches = [loader.state_dict()], []
    try:
        while True:
            batches.append(loader.next_batch())
            states.append(loader.state_dict())
    except StopIteration:
        loader.close()
    for step, state in enumerate(states):
        for rank in range(world_size):
            restored = make_loader(dataset, num_epochs=3, rank=rank, world_size=world_size)
            restored.load_state_dict(state)
            rest = take_all(restored)
            assert len(rest) == len(batches) - step
            for one, other in zip(rest, batches[step:]):
                assert torch.equal(one.inputs, other.inputs[rank::world_size])
                assert torch.equal(one.targets, other.targets[rank::world_size])
            if rest:
                assert restored.stats() == loader.stats()


def test_the_state_is_small_and_made_of_arrays():
    loader = make_loader(chats(2000), T=256, rows=8)
    loader.next_batch()
    state = loader.state_dict()
    loader.close()
    assert all(isinstance(value, np.ndarray) and value.dtype == np.int64 for value in state.values())
    assert sum(value.nbytes for value in state.values()) < 4096


@pytest.mark.parametrize("change", [{"seed": 1}, {"T": 97}, {"dataset": chats(31)}])
def test_another_runs_state_is_refused_by_name(change):
    state = make_loader(chats(30)).state_dict()
    with pytest.raises(UserError, match=r"seed|sequence len|conversations"):
        make_loader(**{"dataset": chats(30), **change}).load_state_dict(state)


def test_rendering_again_gives_the_same(monkeypatch):
    dataset = chats(60)
    kept = take_all(make_loader(dataset, num_epochs=2))
    monkeypatch.setattr(rendered, "CACHE_TOKENS", 500)
    loader = make_loader(dataset, num_epochs=2)
    for one, other in zip(kept, take_all(loader), strict=True):
        assert torch.equal(one.inputs, other.inputs)


def test_seeds():
    orders = [take_all(make_loader(chats(50), seed=seed))[0].inputs.tolist() for seed in (1, 1, 2, -1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] and orders[0] != orders[3]
