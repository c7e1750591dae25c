"""One tokenization per text, shared by all members; padding only when a micro-batch is formed."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import chain, repeat
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from tokenizers.processors import TemplateProcessing

from ..errors import BundleError, InferenceError, InvalidOption, TextError
from ..types import Text
from .forks import FORKS
from .windows import rows_of, rows_of_picks
from .word_cache import WordCache

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""Names of a member's inputs, where it reads tokens."""

_CHARACTERS_AT_ONCE = 2**22  # bounds what the library holds before long texts are cut
_LONGEST = 2**20  # characters that are tokenized of one text; the library takes 100 bytes for each
_LONGEST_WORD = 2**16  # characters, between two spaces
_WHOLE = (
    _CHARACTERS_AT_ONCE  # characters of a text, or of both sides of a pair, that is tokenized whole if it has to be
)
_WORD_END = re.compile(r"(?<=\S)[ \n]")
_SPLIT_AT_SPACES = {"BertPreTokenizer", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit"}
_SPLIT_FURTHER = {"Digits", "Punctuation"}
_KEEP_RUNS = {"BertPreTokenizer", "Punctuation", "Whitespace", "WhitespaceSplit"}  # of letters and digits
_KEEP_LETTERS = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents"}

_FRAMES = 512  # lists of types that are kept, and the tokens of the longest
_PROBES = (
    "The quick brown fox doesn't jump over 13 lazy dogs, does it?",
    'RE: "naive" e-mails from a@b.org (50% off!) cost $9.99 & more',
    "antidisestablishmentarianism xqzzy Aa aB 007 #tag ~/x_y.z;",
)
"""Texts by which putting together words is compared with the library."""

_ONES = np.ones((1, 512), dtype=np.int64)
_ONES.flags.writeable = False


class _Tokens:
    """The tokens of a row: of a text that was too long, made from its words, or tokenized by another process."""

    __slots__ = ("ids", "truncated", "type_ids")

    def __init__(self, ids: Sequence[int], type_ids: Sequence[int], truncated: bool) -> None:
        self.ids, self.type_ids, self.truncated = ids, type_ids, truncated

    def __len__(self) -> int:
        return len(self.ids)


class Encoded:
    """The token ids of some texts, unpadded, in input order: a row for each, or for each of its windows."""

    def __init__(
        self,
        encodings: list[Encoding | _Tokens],
        padding: dict[str, Any],
        seconds: float,
        counts: NDArray[np.intp] | None = None,
        from_words: int = 0,
    ) -> None:
        self._encodings = encodings
        self.counts = counts
        """Rows of each text, (texts,); None where each has one."""
        self._padding = padding
        self.seconds = seconds
        """Time of tokenization."""
        self.from_words = from_words
        """Texts whose ids were put together from those of words, without the tokenizers library."""
        self._lengths: NDArray[np.intp] | None = None
        self._joined: dict[str, NDArray[np.int64]] = {}  # arrays for all texts, made when a batch first needs them

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._encodings) if self.counts is None else len(self.counts)

    @property
    def lengths(self) -> NDArray[np.intp]:
        """Tokens per row, special tokens included, shape (rows,)."""
        if self._lengths is None:
            self._lengths = np.fromiter(map(len, self._encodings), dtype=np.intp, count=len(self._encodings))
        return self._lengths

    @property
    def tokens(self) -> NDArray[np.intp]:
        """Tokens per text, in all of its rows, shape (texts,)."""
        if self.counts is None:
            return self.lengths
        found: NDArray[np.intp] = np.add.reduceat(self.lengths, self.counts.cumsum() - self.counts)
        return found

    @classmethod
    def gathered(cls, picks: Sequence[tuple[Encoded, int]]) -> Encoded:
        """Return single texts of several calls together: for each the call's texts and its position there."""
        rows, counts = rows_of_picks(picks)
        return cls([source._encodings[row] for source, row in rows], picks[0][0]._padding, 0.0, counts)

    def kept(self, texts: NDArray[np.intp]) -> Encoded:
        """Return these texts in the same rows, and the others without tokens."""
        kept: list[Encoding | _Tokens] = [_NO_TOKENS] * len(self._encodings)
        for row in rows_of(self.counts, texts).tolist():
            kept[row] = self._encodings[row]
        return Encoded(kept, self._padding, self.seconds, self.counts)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by arrays, a quarter of what the library's encodings take."""
        ids, types = (self._all(name)[:-1].astype(np.int32) for name in ("ids", "type_ids"))
        truncated = np.array([_was_cut(encoding) for encoding in self._encodings], dtype=bool)
        return _unpickled, (ids, types, self.lengths, truncated, self._padding, self.seconds, self.counts)

    def truncated(self, text: int) -> bool:
        """Return whether tokens of this text were cut off at the maximum length, so that they are in no row."""
        return _was_cut(self._encodings[text if self.counts is None else int(self.counts[:text].sum())])

    def batch(self, rows: NDArray[np.intp], names: Collection[str] = INPUTS) -> dict[str, NDArray[np.int64]]:
        """Pad some rows to the longest of them: int64 arrays of shape (rows, tokens), by input name.

        `names`: those that are needed, among `INPUTS`; the attention mask is always there.
        """
        if len(rows) == 1 and len(encoding := self._encodings[rows[0]]):  # nothing to pad
            ids = np.array([encoding.ids], dtype=np.int64)
            batch = {"input_ids": ids, "attention_mask": _present(len(encoding))}
            if "token_type_ids" in names:
                batch["token_type_ids"] = np.array([encoding.type_ids], dtype=np.int64)
            return batch
        lengths, starts = self.lengths[rows, None], self._all("starts")[rows, None]
        tokens = max(1, int(lengths.max()))
        left = self._padding["direction"] == "left"
        places = np.arange(tokens) - (tokens - lengths if left else 0)  # of a text's tokens, those of padding outside
        present = (places >= 0) & (places < lengths)
        indices = np.where(present, starts + places, -1)  # the last is one of padding
        mask = present.astype(np.int64)
        mask[lengths[:, 0] == 0, -1 if left else 0] = 1  # attends to one token of padding, whatever the others' length
        batch = {"input_ids": self._all("ids")[indices], "attention_mask": mask}
        if "token_type_ids" in names:
            batch["token_type_ids"] = self._all("type_ids")[indices]
        return batch

    def _all(self, name: str) -> NDArray[np.int64]:
        """Return the "ids" or "type_ids" of all texts, one after another, then one of padding; or each text's start."""
        if name not in self._joined:  # two threads may both make it, and it is the same
            if name == "starts":
                self._joined[name] = self.lengths.cumsum() - self.lengths
            else:
                padding = self._padding["pad_id" if name == "ids" else "pad_type_id"]
                each = chain.from_iterable(getattr(encoding, name) for encoding in self._encodings)
                self._joined[name] = np.fromiter(chain(each, [padding]), np.int64, 1 + int(self.lengths.sum()))
        return self._joined[name]


def _present(tokens: int) -> NDArray[np.int64]:
    """Return the attention mask of one text, (1, tokens)."""
    return _ONES[:, :tokens] if tokens <= _ONES.size else np.ones((1, tokens), dtype=np.int64)


_NO_TOKENS = _Tokens([], [], False)


def _was_cut(encoding: Encoding | _Tokens) -> bool:
    return isinstance(encoding, _Tokens) and encoding.truncated


def _unpickled(
    ids: NDArray[np.int32],
    type_ids: NDArray[np.int32],
    lengths: NDArray[np.intp],
    truncated: NDArray[np.bool_],
    padding: dict[str, Any],
    seconds: float,
    counts: NDArray[np.intp] | None,
) -> Encoded:
    ends = lengths.cumsum()
    spans = map(slice, (ends - lengths).tolist(), ends.tolist())
    of_each = zip(spans, truncated.tolist(), strict=True)
    every_id, every_type = ids.tolist(), type_ids.tolist()
    return Encoded([_Tokens(every_id[own], every_type[own], cut) for own, cut in of_each], padding, seconds, counts)


class _Frame:
    """The special tokens around one text or two, and the types of tokens."""

    def __init__(self, before: list[int], between: list[int], after: list[int], types: list[int]) -> None:
        """`between`: two texts. `types`: of the tokens before, the first text's, those between, ..."""
        self.before, self.between, self.after, self._types = before, between, after, types
        self.size = len(before) + len(between) + len(after)
        self._made: dict[tuple[int, int], list[int]] = {}

    @classmethod
    def of(cls, encoding: Encoding) -> _Frame | None:
        """Return the frame of an encoding; None where texts are in another order, or a part has several types."""
        parts: list[tuple[list[int], set[int]]] = [([], set()) for _ in range(5)]
        part = 0
        for number, type_id, side in zip(encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True):
            following = part + part % 2 if side is None else 2 * side + 1
            if following < part:
                return None
            part = following
            parts[part][0].append(number)
            parts[part][1].add(type_id)
        if any(len(types) > 1 for _, types in parts):
            return None
        (before, _), _, (between, _), _, (after, _) = parts
        return cls(before, between, after, [types.pop() if types else 0 for _, types in parts])

    def types_of(self, first: int, second: int) -> list[int]:
        """Return the types of a row of so many tokens of each text; the list is shared and not to be changed."""
        if (found := self._made.get((first, second))) is None:
            sizes = len(self.before), first, len(self.between), second, len(self.after)
            found = [*chain.from_iterable(map(repeat, self._types, sizes))]
            if len(self._made) < _FRAMES and len(found) <= _FRAMES:
                self._made[first, second] = found
        return found


class TextTokenizer:
    """The bundle's tokenizer: sides of padding and truncation from `tokenizer.json`, maximum length from the bundle.

    Texts are cut here and not by the library, which keeps the tokens that it cuts off, for a pair in every combination:
    gigabytes for two texts of 50 kB. Of a text of over a million characters only the beginning is tokenized, up to the
    end of a word: the tokens that remain are the same. (Of a pair of two such texts, up to one token: which of them has
    more tokens is not known.) Where that is not sure, up to four million are tokenized whole, and more are refused.
    Words that are too long for WordPiece, which makes one unknown token of each, are shortened first.

    With a stride, a long text becomes windows, of which the first has the tokens that remain without one: those that
    the library makes (`Encoding.overflowing`). Of a pair, they move over the longer text. The other one is in each of
    them, as it is without a stride: cut where it has more than half of the tokens that there is room for. The library
    leaves it whole, so that a window may move by a single token, or makes windows of every two parts.
    """

    def __init__(self, file: Path, max_length: int, pair: bool, *, word_cache: bool = True) -> None:
        """Load `file`; raise BundleError where the tokenizers library cannot.

        `word_cache`: whether texts may be put together from the ids of their words: see `WordCache`.
        """
        try:
            with FORKS:
                self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise BundleError(f"{file}: not a tokenizer that can be used ({error}); export the bundle again") from error
        self._padding: dict[str, Any] = self._tokenizer.padding or {
            "pad_id": 0,
            "pad_type_id": 0,
            "direction": "right",
        }
        self.cuts_left = (self._tokenizer.truncation or {}).get("direction") == "left"
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if pair and self._tokenizer.post_processor is None:  # else the second text has type 1 alone, and 0 in a batch
            self._tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B:1")
        self.max_length = max_length
        self.pads_left = self._padding["direction"] == "left"
        self._pair = pair
        self._words: WordCache | None = None
        with FORKS:
            words = WordCache.of(self._tokenizer, self._encode_words) if word_cache else None
        if words is not None:
            self._use(words)

    def _use(self, words: WordCache) -> None:
        """Put texts together from words, unless some show that this does not give the library's tokens after all."""
        with suppress(Exception):  # no token for what is unknown: the library raises bare Exceptions
            frame = _Frame.of(self._encode([("a", "a") if self._pair else "a"])[0])
            if frame is not None:
                self._words, self._frame = words, frame
                if all(map(self._agrees, _PROBES)):
                    return
        self._words = None

    def _agrees(self, text: str) -> bool:
        """Return whether words give the library's tokens of a text, or leave it to the library.

        Texts are compared one by one, which starts no threads: a forked process would not have them.
        """
        probe = (text, text[::-1]) if self._pair else text
        (row,), (encoding,) = self._from_words([probe], None), self._encode([probe])
        return row is None or row.truncated or (row.ids, row.type_ids) == (encoding.ids, encoding.type_ids)

    def check_stride(self, stride: int) -> None:
        """Raise InvalidOption where windows could not share so many tokens and still move on."""
        with FORKS:
            room = self.max_length - self._tokenizer.num_special_tokens_to_add(self._pair)
        fewest = room - room // 2 if self._pair else room  # of a window, besides special tokens and the other text
        if stride >= fewest:
            most = f"from 0 to {fewest - 1}" if fewest > 0 else "none"
            raise InvalidOption("stride", stride, f"{most}, as this bundle takes {self.max_length} tokens")

    def encode(self, texts: Sequence[Text], stride: int | None = None) -> Encoded:
        """Encode texts (or pairs); raise TextError for anything else, and for pairs where single texts are expected.

        `stride`: tokens that the windows of a long text share; None cuts it.
        """
        for index, text in enumerate(texts):
            self._check(text, index)
        texts = list(texts)
        started = perf_counter()
        try:
            rows = self._from_words(texts, stride)
            seconds = perf_counter() - started
            if None not in rows:
                return Encoded(rows, self._padding, seconds, None, len(rows))
            rest = [index for index, row in enumerate(rows) if row is None]
            others, more = self._by_library([texts[index] for index in rest], stride)
        except TextError as error:
            raise TextError(rest[error.index], error.reason) from error.__cause__
        except (TypeError, UnicodeEncodeError) as error:
            raise _not_unicode(texts) from error
        except MemoryError as error:
            raise InferenceError("memory ran out while texts were tokenized; send fewer or shorter texts") from error
        except Exception as error:  # the library raises bare Exceptions
            raise BundleError(f"the bundle's tokenizer cannot encode these texts ({error}); export it again") from error
        encodings: list[Encoding | _Tokens] = []
        counts = np.ones(len(texts), dtype=np.intp)
        following = iter(others)
        for index, row in enumerate(rows):
            windows = next(following) if row is None else [row]
            encodings += windows
            counts[index] = len(windows)
        all_alone = len(encodings) == len(texts)
        from_words = len(texts) - len(rest)
        return Encoded(encodings, self._padding, seconds + more, None if all_alone else counts, from_words)

    def _from_words(self, texts: Sequence[Text], stride: int | None) -> list[_Tokens | None]:
        """Put together the tokens of texts from those of words; None for a text that the library has to tokenize."""
        words = self._words
        if words is None:
            return [None] * len(texts)
        if not self._pair:
            found = [words.ids_of_one(texts[0])] if len(texts) == 1 else words.ids_of(texts)  # type: ignore[arg-type]
            return [None if ids is None else self._framed(ids, [], stride) for ids in found]
        sides = words.ids_of([side for text in texts for side in text])
        pairs = zip(sides[::2], sides[1::2], strict=True)
        return [
            None if first is None or second is None else self._framed(first, second, stride) for first, second in pairs
        ]

    def _framed(self, first: list[int], second: list[int], stride: int | None) -> _Tokens | None:
        """Return a row of the ids of one text or two, cut to the maximum length; None if it has to become windows."""
        frame = self._frame
        excess = frame.size + len(first) + len(second) - self.max_length
        if excess > 0:
            if stride is not None:
                return None
            rooms = _room(len(first), len(second), excess)
            first, second = (self._cut(ids, room) for ids, room in zip((first, second), rooms, strict=True))
        ids = [*frame.before, *first, *frame.between, *second, *frame.after]
        return _Tokens(ids, frame.types_of(len(first), len(second)), excess > 0)

    def _cut(self, ids: list[int], room: int) -> list[int]:
        return ids[len(ids) - room :] if self.cuts_left else ids[:room]

    def _encode_words(self, words: list[str], many: bool) -> Sequence[Encoding]:
        with FORKS:
            if many and len(words) > 1 and FORKS.own_tokenizers_threads():
                encodings: list[Encoding] = self._tokenizer.encode_batch_fast(words, add_special_tokens=False)
                return encodings
            return [self._tokenizer.encode(word, add_special_tokens=False) for word in words]

    def _by_library(self, texts: list[Text], stride: int | None) -> tuple[list[list[Encoding | _Tokens]], float]:
        """Return the rows of each text, and the seconds that the library's calls took."""
        long = self._shortened(texts, whole=stride is not None)
        seconds = 0.0
        found: list[list[Encoding | _Tokens]] = []
        for part in _parts(texts):
            started = perf_counter()
            encoded = self._encode(part)
            for at in range(len(part)) if long else ():
                index = len(found) + at
                if index in long and (few := self._too_few(encoded[at], part[at], long[index])):
                    self._check_whole(long[index], index, few)
                    encoded[at] = self._encode([long[index]])[0]
            seconds += perf_counter() - started
            for each in encoded:
                found.append([each] if len(each) <= self.max_length else [*self._windows(each, stride)])
        return found, seconds

    def _shortened(self, texts: list[Text], *, whole: bool) -> dict[int, Text]:
        """Take out of huge texts what their tokens do not need; return those whose end was left out, by position.

        `whole`: all of their tokens are needed.
        """
        long: dict[int, Text] = {}
        for index, text in enumerate(texts):
            if (len(text) if isinstance(text, str) else _longest_side(text)) > _LONGEST:
                with FORKS:  # a cached property has a lock before Python 3.12
                    shorter = texts[index] = _each_side(self._with_shorter_words, text)
                    if whole:
                        self._check_whole(shorter, index, "windows are made of all of it")
                    elif _longest_side(shorter) > _LONGEST:
                        texts[index] = _each_side(partial(self._beginning, index=index), shorter)
                        long[index] = shorter
        return long

    def _with_shorter_words(self, text: str) -> str:
        """Return a text without the middle of runs of letters and digits that are unknown words either way."""
        return text if self._long_run is None else self._long_run.sub(r"\1\2", text)

    @cached_property
    def _long_run(self) -> re.Pattern[str] | None:
        """Runs that are too long for a word by their beginning alone; None where another model takes all words."""
        state: Mapping[str, Any] = json.loads(self._tokenizer.to_str())
        longest = state["model"].get("max_input_chars_per_word")
        normalizer, pre_tokenizer = state["normalizer"] or {"normalizers": []}, state["pre_tokenizer"] or {}
        if state["model"]["type"] != "WordPiece" or not longest:
            return None
        if not {part["type"] for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer])} <= _KEEP_RUNS:
            return None
        if not {part["type"] for part in normalizer.get("normalizers", [normalizer])} <= _KEEP_LETTERS:
            return None
        added = [token["content"] for token in state["added_tokens"]]
        if any(token.isalnum() for token in added):  # found in the middle of a run too
            return None
        kept = longest + max(map(len, added), default=0) + 1
        return re.compile(f"(?<![A-Za-z0-9])([A-Za-z0-9]{{{kept}}})[A-Za-z0-9]+([A-Za-z0-9]{{{kept}}})")

    def _beginning(self, text: str, index: int) -> str:
        """Return a text without what is far beyond the maximum length; raise TextError where that is unsafe."""
        if len(text) <= _LONGEST:
            return text
        if self.cuts_left or not self._splits_at_spaces:
            self._check_whole(text, index, "this bundle's tokenizer needs all of it")
            return text
        ends = [found.start() for found in _WORD_END.finditer(text, _LONGEST - _LONGEST_WORD, _LONGEST)]
        if not ends:
            self._check_whole(text, index, f"no word ends shortly before character {_LONGEST:,}")
            return text
        return text[: ends[-1]]

    def _check_whole(self, text: Text, index: int, reason: str) -> None:
        """Raise TextError, with why it cannot be cut, if a text is too long to be tokenized whole."""
        if _longest_side(text) > (limit := _WHOLE // 2 if self._pair else _WHOLE):
            raise TextError(index, f"found over {limit:,} characters, and {reason}; shorten the text")

    @cached_property
    def _splits_at_spaces(self) -> bool:
        """True if words are tokenized on their own, whatever follows them."""
        pre_tokenizer: Mapping[str, Any] = json.loads(self._tokenizer.to_str())["pre_tokenizer"] or {
            "pretokenizers": []
        }
        parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
        kinds = {part["type"] for part in parts if part.get("use_regex", True) and part.get("split", True)}
        return bool(kinds & _SPLIT_AT_SPACES) and kinds <= _SPLIT_AT_SPACES | _SPLIT_FURTHER

    def _too_few(self, encoding: Encoding, beginning: Text, whole: Text) -> str:
        """Return why the beginning of a text has not all tokens that remain of it; empty if it has."""
        sides = encoding.sequence_ids
        for side, (part, text) in enumerate(zip(_sides(beginning), _sides(whole), strict=True)):
            if len(part) < len(text) and (tokens := sides.count(side)) <= self.max_length:
                return f"the first {_LONGEST:,} have only {tokens} tokens"
        return ""

    def _encode(self, texts: list[Text]) -> list[Encoding]:
        with FORKS:
            # One text is not worth waking the library's threads, and those of a parent process do not answer.
            if len(texts) > 1 and FORKS.own_tokenizers_threads():
                encodings: list[Encoding] = self._tokenizer.encode_batch_fast(texts)
                return encodings
            pairs = [(text, None) if isinstance(text, str) else text for text in texts]
            return [self._tokenizer.encode(first, second) for first, second in pairs]

    def _windows(self, encoding: Encoding, stride: int | None) -> list[_Tokens]:
        """Cut a text to the maximum length, a pair on its longer side first; special tokens stay in every window.

        `stride`: None for the first window alone.
        """
        excess = len(encoding) - self.max_length
        sides = np.array([-1 if side is None else side for side in encoding.sequence_ids])
        first, second = np.flatnonzero(sides == 0), np.flatnonzero(sides == 1)
        rooms = _room(len(first), len(second), excess)
        moving, other, size, room = first, second, *rooms
        if len(first) <= len(second):
            moving, other, room, size = second, first, *rooms
        fixed = np.concatenate([np.flatnonzero(sides < 0), self._part(other, 0, room)])
        starts = range(1) if stride is None else range(0, max(1, len(moving) - stride), size - stride)
        cut = len(other) > room or (stride is None and len(moving) > size)
        ids, types = np.array(encoding.ids, dtype=np.int32), np.array(encoding.type_ids, dtype=np.int32)
        windows = []
        for start in starts:
            kept = np.sort(np.concatenate([fixed, self._part(moving, start, size)]))
            windows.append(_Tokens(array("i", ids[kept].tobytes()), array("i", types[kept].tobytes()), cut))
        return windows

    def _part(self, tokens: NDArray[np.intp], start: int, size: int) -> NDArray[np.intp]:
        """Return so many of one side's tokens, counted from the side that remains when it is cut."""
        if self.cuts_left:
            end = len(tokens) - start
            return tokens[max(0, end - size) : end]
        return tokens[start : start + size]

    def _check(self, text: object, index: int) -> None:
        if self._pair:
            if isinstance(text, tuple | list) and len(text) == 2 and all(isinstance(part, str) for part in text):
                return
            raise TextError(index, f"found {_kind(text)}, expected a pair of texts: this bundle's task is on pairs")
        if not isinstance(text, str):
            raise TextError(index, f"found {_kind(text)}, expected a text: this bundle's task is on single texts")


def _sides(text: Text) -> Sequence[str]:
    return (text,) if isinstance(text, str) else text


def _each_side(change: Callable[[str], str], text: Text) -> Text:
    return change(text) if isinstance(text, str) else (change(text[0]), change(text[1]))


def _longest_side(text: Text) -> int:
    return max(map(len, _sides(text)))


def _room(first: int, second: int, excess: int) -> tuple[int, int]:
    """Return how many tokens of each side remain when `excess` are cut, from the longer side first, then evenly."""
    total = max(0, first + second - excess)
    if second == 0:
        return total, 0
    shorter, longer = sorted((first, second))
    if shorter > total - shorter:
        shorter, longer = total // 2, total - total // 2
    else:
        longer = total - shorter
    return (shorter, longer) if first <= second else (longer, shorter)


def _parts(texts: Sequence[Text]) -> Iterator[list[Text]]:
    part: list[Text] = []
    characters = 0
    for text in texts:
        part.append(text)
        characters += len(text) if isinstance(text, str) else len(text[0]) + len(text[1])
        if characters > _CHARACTERS_AT_ONCE:
            yield part
            part, characters = [], 0
    if part:
        yield part


def _not_unicode(texts: Sequence[Text]) -> TextError:
    for index, text in enumerate(texts):
        try:
            "".join(text).encode()
        except UnicodeEncodeError as error:
            found = "half a surrogate pair"
            if 0xDC80 <= (code := ord(error.object[error.start])) <= 0xDCFF:  # as Python decodes arguments
                found = f"a byte that is not UTF-8 (0x{code - 0xDC00:x}), or half a surrogate pair,"
            return TextError(index, f"found {found} at character {error.start}, expected Unicode text; replace it")
    return TextError(0, "the tokenizer refused these texts; expected Unicode text")


def _kind(text: object) -> str:
    if isinstance(text, str):
        return "a single text"
    if isinstance(text, tuple | list):
        return f"a {type(text).__name__} of {len(text)}"
    return type(text).__name__
