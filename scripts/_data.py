"""The flags of every script that reads text, and the corpus that they name."""

from dataclasses import dataclass
from pathlib import Path

from nanochat.common import say
from nanochat.dataset import Corpus, resolve_corpus


@dataclass
class DataConfig:
    """Which documents to read."""

    data: str = ""
    """starter, fineweb-edu, climbmix, or files, folders, globs and URLs, separated by commas; empty: downloaded or
    starter."""
    text_field: str = "text"
    """The field or column of your own data that holds the text."""
    skip_bad_shards: bool = False
    """Continue without files of the data that are missing or damaged, and name them."""

    def open_corpus(self, base_dir: Path) -> Corpus:
        """The corpus; prints which files are used and which are not."""
        corpus = resolve_corpus(self.data, base_dir, text_field=self.text_field, skip_bad=self.skip_bad_shards)
        if corpus.files:
            say(f"data: {corpus.describe()}")
        return corpus
