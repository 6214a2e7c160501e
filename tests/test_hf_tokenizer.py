"""Tokenizers as Hugging Face's files: the same ids, decoding, chats and masks, and back."""

import pytest

from nanochat.formats.hf_tokenizer import write_tokenizer
from nanochat.tokenizer import RustBPETokenizer

transformers = pytest.importorskip("transformers")

TEXTS = ["The cat's  2nd 123456 hats,\n\n it'S naïve <|bos|> — été 你好 😀!", "a" * 9, " \t\r\n x "]
TOKENIZER = RustBPETokenizer.train_from_iterator([*TEXTS * 3, "the cats and the hats " * 5], 300)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(TOKENIZER, folder, chat=True, sequence_len=64)
    return transformers.AutoTokenizer.from_pretrained(folder)


def plain(theirs, text: str) -> list[int]:
    return theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_texts_have_the_same_ids(theirs):
    for text in TEXTS:
        assert plain(theirs, text) == TOKENIZER.encode(text)
        assert theirs.decode(TOKENIZER.encode(text)) == text
