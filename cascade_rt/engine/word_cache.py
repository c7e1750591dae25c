"""Token ids of words that were tokenized before, for texts that can be put together from words between spaces.

Most texts of a domain are made of a few thousand words. Where a tokenizer reads each word on its own, the ids of a text
are those of its words, one after another, and looking them up is faster than tokenizing. The library tokenizes each
word once, and every text for which this would not be exact.
"""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from sys import getsizeof
from threading import Lock
from typing import Any

from tokenizers import Encoding, Tokenizer

from .forks import FORKS

MOST_BYTES = 24 * 2**20
"""The size of the words and ids that are kept; beyond it all are dropped, and learned again."""
_LONGEST_WORD, _LONGEST_TEXT = 64, 10_000  # characters: longer ones are seldom seen again
_AT_ONCE = 64  # texts whose unknown words are tokenized together

_SPLIT_AT_SPACES = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_SPLIT_FURTHER = {"Digits", "Punctuation"}
_KEEP_SPACES = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents"}
_KEEP_ASCII = {"Nmt", "Precompiled", "Strip"}

_SPACES = str.maketrans("\t\n\r", "   ")

Ids = tuple[int, ...] | None
"""The ids of a word; None for one that has to be tokenized within its text."""
Tokenize = Callable[[list[str], bool], Sequence[Encoding]]
"""Encodes words without special tokens; the flag says whether they are of several texts."""
Mark = Callable[[list[str]], list[str]]
"""Adds to words the spaces that their tokens include."""


class WordCache:
    """The ids of words, filled as texts come; safe to use from several threads and after forks.

    It takes printable texts whose whitespace is spaces, tabs and line ends. Where tokens include the space before a
    word (byte-level and Metaspace), it takes ASCII with single spaces only. It does not take texts with added tokens,
    such as "[MASK]".
    """

    def __init__(self, added: Mapping[int, str], unknown: str | None, tokenize: Tokenize, mark: Mark | None) -> None:
        """Start without words.

        `added`: the tokenizer's added tokens by their id; `unknown`: that of words that it does not know; `mark`: None
        where tokens include no spaces.
        """
        self._added = added
        self._unknown = {number for number, content in added.items() if content == unknown}
        self._tokenize = tokenize
        self._mark = mark
        self._known: dict[str, Ids] = {}
        self._bytes = 0
        self._learning = Lock()

    @classmethod
    def of(cls, tokenizer: Tokenizer, tokenize: Tokenize) -> WordCache | None:
        """Return a cache for a tokenizer; None where words are not read apart from each other."""
        added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
        if getattr(tokenizer.model, "dropout", None):
            return None
        spaced = [content for content in added.values() if any(map(str.isspace, content))]
        runs = all(len(content) > 1 and not content.strip(" ") for content in spaced)  # texts with these are not taken
        make = partial(cls, added, getattr(tokenizer.model, "unk_token", None), tokenize)
        pre_tokenizers, normalizers = _parts(tokenizer.pre_tokenizer), _parts(tokenizer.normalizer)
        kinds = {part["type"] for part in pre_tokenizers}
        if kinds & _SPLIT_AT_SPACES and kinds <= _SPLIT_AT_SPACES | _SPLIT_FURTHER:
            return make(None) if not spaced and {part["type"] for part in normalizers} <= _KEEP_SPACES else None
        if runs and all(map(_keeps_ascii, normalizers)) and pre_tokenizers:
            *others, last = pre_tokenizers
            if last["type"] == "ByteLevel" and last.get("use_regex", True) and not others:
                return make(_all_marked if last["add_prefix_space"] else _all_but_first_marked)
            if last["type"] == "Metaspace" and last.get("split", True) and kinds <= {"WhitespaceSplit", "Metaspace"}:
                schemes = {"always"} if others else {"always", "first"}
                return make(list) if last["prepend_scheme"] in schemes else None
        return None

    def ids_of_one(self, text: str) -> list[int] | None:
        """Return the ids of one text, as `ids_of`."""
        try:
            return _joined(self._known, self._words(text))
        except KeyError:
            return self.ids_of([text])[0]

    def ids_of(self, texts: Sequence[str]) -> list[list[int] | None]:
        """Return the ids of each text, without special tokens; None for a text that it does not take."""
        found: list[list[int] | None] = []
        for start in range(0, len(texts), _AT_ONCE):
            words = list(map(self._words, texts[start : start + _AT_ONCE]))
            known: MutableMapping[str, Ids] = self._known  # another thread may replace it
            try:
                found += [_joined(known, each) for each in words]
            except KeyError:
                new = {word for each in words if each is not None for word in each if word not in known}
                known = ChainMap(self._learned(new, len(texts) > 1), known)
                found += [_joined(known, each) for each in words]
        return found

    def _words(self, text: str) -> list[str] | None:
        if len(text) > _LONGEST_TEXT:
            return None
        if self._mark is None:
            if not text.isprintable():
                text = text.translate(_SPACES)
            return text.split() if text.isprintable() else None
        words = text.split()
        plain = text.isascii() and text.isprintable() and len(words) == text.count(" ") + 1
        return self._mark(words) if plain else None

    def _learned(self, words: Iterable[str], many: bool) -> dict[str, Ids]:
        """Tokenize words, and keep their ids where there is room; `many`: they are of several texts."""
        learned: dict[str, Ids] = dict.fromkeys(words)
        short = [word for word in learned if len(word) <= _LONGEST_WORD]
        for word, encoding in zip(short, self._tokenize(short, many), strict=True):
            ids = tuple(encoding.ids)
            found = [number for number in ids if number in self._added]
            if all(number in self._unknown and self._added[number] not in word for number in found):
                learned[word] = ids
        size = sum(_size(word, ids) for word, ids in learned.items())
        if size > MOST_BYTES:
            return learned
        with FORKS, self._learning:
            if self._bytes + size > MOST_BYTES:
                self._known, self._bytes = {}, 0
            self._known.update(learned)
            self._bytes += size
        return learned


def _joined(known: Mapping[str, Ids], words: list[str] | None) -> list[int] | None:
    if words is None:
        return None
    ids: list[int] = []
    add: Callable[[Any], None] = ids.extend
    try:
        for word in words:
            add(known[word])
    except TypeError:  # a word is None
        return None
    return ids


def _size(word: str, ids: Ids) -> int:
    """Return the bytes of an entry: those of its objects, and its share of the table."""
    return 104 + getsizeof(word) + (getsizeof(ids) + 32 * len(ids) if ids else 0)


def _all_marked(words: list[str]) -> list[str]:
    return [f" {word}" for word in words]


def _all_but_first_marked(words: list[str]) -> list[str]:
    return [*words[:1], *(f" {word}" for word in words[1:])]


def _parts(component: Any) -> list[Mapping[str, Any]]:
    """Return the normalizers or pre-tokenizers of a sequence, or the only one, as JSON; none for None."""
    return [] if component is None else _unfolded(json.loads(component.__getstate__()))  # the tokenizer's has all words


def _unfolded(described: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = described.get("normalizers", described.get("pretokenizers"))
    return [described] if inner is None else [part for each in inner for part in _unfolded(each)]


def _keeps_ascii(normalizer: Mapping[str, Any]) -> bool:
    """Return whether a normalizer treats words of ASCII between single spaces each on its own."""
    if normalizer["type"] == "Replace":
        pattern, content = normalizer["pattern"], normalizer["content"]
        keeps = bool(content) and not any(map(str.isspace, content)) and " " not in pattern.get("String", " ")
        return keeps or pattern.get("Regex") == " {2,}"
    return normalizer["type"] in _KEEP_SPACES | _KEEP_ASCII
