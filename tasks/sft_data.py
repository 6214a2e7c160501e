"""The conversations of a finetuning run: loaders over a mixture, and the count of what is used and what is not."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError, atomic_write
from nanochat.common.output import ProgressLine
from nanochat.conversation import Conversation, Tokenizer
from nanochat.data.batches import seeded_rng
from nanochat.data.rendered import NO_ANSWER, TOO_LONG, TRUNCATED, USES, WHOLE, RenderedConversations, render_row
from nanochat.dataloader import ConversationLoader
from nanochat.runtime import Runtime
from tasks.common import TaskMixture
from tasks.mixtures import Part, Source

EVAL_ROWS = 8  # per evaluation step over all ranks: there may be few held-out conversations
COUNTED = 20_000  # conversations of a part that are rendered to be counted; of a larger part a random sample
COUNT_RNG = 5  # purpose of its generator (batches.seeded_rng)
SHOWN = 5  # bad conversations named on the console; all of them in a file
MANY_LEFT_OUT = 0.1  # of the conversations: a warning


@dataclass
class PartUse:
    """What becomes of a part's conversations."""

    part: Part
    uses: Counter[str]  # of those looked at, by rendered.USES
    tokens: int  # of those that were looked at and are used
    left_out: list[str]  # place and reason of each that was looked at and is not used

    @property
    def scale(self) -> float:
        """From what was looked at to an epoch."""
        return self.part.passes * len(self.part.task) / max(1, self.uses.total())

    @property
    def used(self) -> float:
        """Conversations of an epoch that are used, whole or truncated."""
        return self.scale * (self.uses.total() - len(self.left_out))

    def describe(self, total: float) -> str:
        """`490 conversations x 3 (12%): 40 whole, 9 truncated to whole turns, left out: 441 too long`

        The share is that of `total`, the conversations of an epoch that are used.
        """
        count, looked_at, passes = len(self.part.task), self.uses.total(), self.part.passes
        text = f"{count:,} conversations{'' if passes == 1 else f' x {passes:g}'} ({self.used / max(1, total):.0%})"
        if self.uses[WHOLE] < looked_at:
            found = [f"{self.uses[WHOLE]:,} whole"]
            found += [f"{self.uses[TRUNCATED]:,} truncated to whole turns"] if self.uses[TRUNCATED] else []
            found += [f"left out: {reasons(self.uses)}"] if self.left_out else []
            text += f": {'' if looked_at == count else f'of {looked_at:,} looked at '}{', '.join(found)}"
        return f"{text}; {self.part.malformed:,} rows are no conversation" if self.part.malformed else text

    def record(self) -> dict[str, Any]:
        """For checkpoints and the report."""
        count, looked_at = len(self.part.task), self.uses.total()
        sample = {} if looked_at == count else {"looked at": looked_at}
        malformed = {"no conversation": self.part.malformed} if self.part.malformed else {}
        source = {"source": self.part.name, "conversations": count, "passes": self.part.passes}
        return source | sample | {use: self.uses[use] for use in USES} | malformed


def reasons(uses: Counter[str]) -> str:
    """`441 too long, 3 no answer`"""
    return ", ".join(f"{uses[reason]:,} {reason}" for reason in (TOO_LONG, NO_ANSWER) if uses[reason])


def count_uses(
    parts: Sequence[Part], mixture: TaskMixture, rendered: RenderedConversations, seed: int
) -> list[PartUse]:
    """What becomes of the conversations of each part of a mixture, in its first pass."""
    found: list[PartUse] = []
    position = 0  # of the part's first pass among the mixture's tasks
    progress = ProgressLine(lambda: f"looked at {len(looked):,} conversations of {part.name}: which fit a row?")
    for part in parts:
        indices = np.flatnonzero(mixture.owner == position)
        if len(indices) > COUNTED:
            indices = seeded_rng(COUNT_RNG, seed, position).choice(indices, COUNTED, replace=False)
        indices = indices[np.argsort(mixture.local[indices])]  # in the order of the file
        looked = {}
        for index in indices.tolist():
            looked[index] = rendered.get(index)
            progress.show()
        uses = Counter(conversation.use for conversation in looked.values())
        tokens = sum(len(conversation.ids) for conversation in looked.values() if conversation.ids is not None)
        places = [
            f"{mixture.place(i)}: {conversation.use}" for i, conversation in looked.items() if conversation.ids is None
        ]
        found.append(PartUse(part, uses, tokens, places))
        position += len(part.tasks(seed))
    progress.close()
    return found


@dataclass
class SFTData:
    """The conversations to train and to validate on."""

    loader: ConversationLoader
    make_validation: Callable[[], ConversationLoader]
    fingerprint: str
    own_fingerprint: str  # of every line of one's own files, where `fingerprint` has samples
    parts: list[PartUse]
    held_out: list[PartUse]
    bad: list[str]  # place and reason of each row that is no conversation
    preview: Conversation  # the first that is used

    @property
    def tokens(self) -> float:
        """Tokens of an epoch, without padding; an estimate for large data."""
        return sum(use.tokens * use.scale for use in self.parts)

    @property
    def held_out_tokens(self) -> float:
        """The same of all held-out conversations."""
        return sum(use.tokens * use.scale for use in self.held_out)

    def plan_rows(self) -> list[tuple[str, str]]:
        """What is used of each part, and of the held-out conversations, as rows of the plan."""
        total = sum(use.used for use in self.parts)
        rows = [(use.part.name, use.describe(total)) for use in self.parts]
        count = sum(len(use.part.task) for use in self.held_out)
        used = round(sum(use.used for use in self.held_out))
        return [*rows, ("held out", f"{count:,} conversations" + (f", {used:,} of them used" if used < count else ""))]

    def table(self) -> list[dict[str, Any]]:
        """The same for checkpoints and the report, a row each."""
        held_out = [use.record() | {"source": f"{use.part.name}, held out"} for use in self.held_out]
        return [use.record() for use in self.parts] + held_out

    def name_left_out(self, listing: Path, strict: bool, runtime: Runtime) -> None:
        """Say how many conversations are left out, and write all of them to `listing`. UserError if `strict`."""
        uses_of_parts = [*self.parts, *self.held_out]
        left_out = [line for use in uses_of_parts for line in use.left_out]
        write_listing(listing, [*self.bad, *left_out], runtime)
        if left_out:
            uses = sum((use.uses for use in uses_of_parts), Counter[str]())
            count = f"{len(left_out):,} of {uses.total():,} conversations are left out"
            text = f"{count}: {reasons(uses)}; listed in {listing}"
            if strict:
                raise UserError(f"{text} (--strict)")
            (runtime.warn0 if len(left_out) > MANY_LEFT_OUT * uses.total() else runtime.print0)(text)


def check_sources(sources: Sequence[Source], listing: Path, strict: bool, runtime: Runtime) -> None:
    """Say what of --data is not used: missing data sets, files of other kinds, rows that are no conversation.

    All of the latter are written to `listing`. Raises UserError if nothing is left of a source, or, `strict`, if
    anything is bad.
    """
    for reason in (reason for source in sources for reason in source.missing):
        runtime.print0(f"skipped: {reason}")
    own = [(source.name, source.own) for source in sources if source.own is not None]
    for name, chats in own:
        runtime.print0(f"{name}: {chats.listing}")
    if len(own) == len(sources):
        mixed = ",".join(["starter", *(chats.path for _, chats in own)])
        runtime.print0(f"note: your conversations alone unlearn the model's other skills; to keep them: --data={mixed}")
    bad = [row for _, chats in own for row in chats.bad]
    write_listing(listing, bad, runtime)
    for row in bad[:SHOWN]:
        runtime.warn0(f"left out: {row}")
    if len(bad) > SHOWN:
        runtime.warn0(f"left out: {len(bad) - SHOWN:,} more, listed in {listing}")
    for name, chats in own:
        if chats.bad and (strict or not len(chats)):
            count = f"{len(chats.bad):,} of {len(chats.bad) + len(chats):,} rows are no conversation"
            strictly = " (--strict)" if len(chats) else ""
            raise UserError(f"{name}: {count}{strictly}, the first: {chats.bad[0]}; all are listed in {listing}")
        if len(chats) < 2:
            raise UserError(f"{name} holds 1 conversation: at least two are needed, one of them for validation")


def write_listing(path: Path, lines: Sequence[str], runtime: Runtime) -> None:
    """Write the lines to a file, on the main rank; without any, remove the one of an earlier run."""
    if runtime.is_main and lines:
        with atomic_write(path, "w") as file:
            file.writelines(f"{line}\n" for line in lines)
    elif runtime.is_main:
        path.unlink(missing_ok=True)


def open_sft_data(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    runtime: Runtime,
    rows: int,
    T: int,
    seed: int,
    num_epochs: int | None,
    *,
    by_tail: bool = False,
) -> SFTData:
    """Split, mix and count the sources, for steps of `rows` rows of T tokens.

    Raises UserError now, not hours later, where no conversation can be used.
    """

    def usable(conversation: Conversation) -> bool:
        return render_row(tokenizer, conversation, T + 1).ids is not None

    for source in sources:
        source.split(usable, by_tail)
    train = [part for source in sources for part in source.train]
    val = [part for source in sources for part in source.val]
    mixture = TaskMixture([task for part in train for task in part.tasks(seed)], seed=seed)
    held_out = TaskMixture([part.task for part in val], seed=0)
    make_loader = partial(
        ConversationLoader, tokenizer=tokenizer, sequence_len=T, rank=runtime.rank, world_size=runtime.world_size
    )
    loader = make_loader(mixture, rows_per_step=rows, seed=seed, num_epochs=num_epochs)
    make_validation = partial(make_loader, held_out, rows_per_step=EVAL_ROWS, seed=0, num_epochs=1)
    parts = count_uses(train, mixture, loader.rendered, seed)
    held_parts = count_uses(val, held_out, make_validation().rendered, seed)
    check_uses(parts, held_parts, [source.name for source in sources if source.own is not None], T)
    own = next((source.train[0].task for source in sources if source.own is not None), mixture)
    return SFTData(
        loader,
        make_validation,
        mixture.fingerprint(),
        hash_of_lines(line for source in sources if source.own is not None for line in source.own.chats.lines),
        parts,
        held_parts,
        [row for source in sources if source.own is not None for row in source.own.bad],
        next(conversation for conversation in own if usable(conversation)),
    )


def hash_of_lines(lines: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line + b"\n")
    return digest.hexdigest()[:16]


def check_uses(parts: Sequence[PartUse], held_out: Sequence[PartUse], own: Sequence[str], T: int) -> None:
    """Raise UserError if there is nothing to train or to validate on, or nothing in a file of one's own."""
    groups = [("train", parts), ("validate", held_out)]
    groups += [("train", [use]) for use in parts if use.part.name in own]
    for purpose, group in groups:
        if not any(use.used for use in group):
            uses = sum((use.uses for use in group), Counter[str]())
            names = ", ".join(use.part.name for use in group)
            raise UserError(
                f"nothing to {purpose} on in {names}: of {uses.total():,} conversations {reasons(uses)} (a row holds "
                f"{T} tokens): pretrain with a larger --max-seq-len, or shorten the conversations"
            )
