"""One encode per text, shared by all members; padding only when a micro-batch is formed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from .errors import BundleError, InputError
from .records import Text


class Encoded:
    """The token ids of some texts, unpadded, in input order."""

    def __init__(self, encodings: list[Encoding], padding: dict[str, Any]) -> None:
        self._encodings = encodings
        self._padding = padding
        self.lengths: NDArray[np.intp] = np.fromiter(map(len, encodings), dtype=np.intp, count=len(encodings))
        """Tokens per text, special tokens included, shape (texts,)."""

    def truncated(self, row: int) -> bool:
        """Whether tokens of this text were cut off at the maximum length."""
        return bool(self._encodings[row].overflowing)

    def batch(self, rows: NDArray[np.intp]) -> dict[str, NDArray[np.int64]]:
        """Pad some texts to the longest of them: three int64 arrays of shape (rows, tokens), by input name."""
        lengths = self.lengths[rows]
        shape = (len(rows), max(1, int(lengths.max())))
        ids = np.full(shape, self._padding["pad_id"], dtype=np.int64)
        types = np.full(shape, self._padding["pad_type_id"], dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        left = self._padding["direction"] == "left"
        for at, row in enumerate(rows):
            encoding, length = self._encodings[row], lengths[at]
            span = slice(shape[1] - length, None) if left else slice(length)
            ids[at, span] = encoding.ids
            types[at, span] = encoding.type_ids
            mask[at, span] = 1
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


class TextTokenizer:
    """The bundle's tokenizer; truncation and padding are as `tokenizer.json` says, at the bundle's length."""

    def __init__(self, file: Path, max_length: int, pair: bool) -> None:
        """Load `file`; raise BundleError where the tokenizers library cannot."""
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
            self._padding: dict[str, Any] = self._tokenizer.padding or {
                "pad_id": 0,
                "pad_type_id": 0,
                "direction": "right",
            }
            self._tokenizer.no_padding()
            truncation = self._tokenizer.truncation or {}
            self._tokenizer.enable_truncation(
                max_length, strategy="longest_first", direction=truncation.get("direction", "right")
            )
        except Exception as error:  # the library raises bare Exceptions
            raise BundleError(f"{file}: not a tokenizer that can be used ({error}); export the bundle again") from None
        self.max_length = max_length
        self._pair = pair

    def encode(self, texts: Sequence[Text]) -> Encoded:
        """Encode texts (or pairs); raise InputError for what is neither, and for pairs where single texts belong."""
        for index, text in enumerate(texts):
            self._check(text, index)
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts))
        except (TypeError, UnicodeEncodeError):
            raise self._not_unicode(texts) from None
        return Encoded(encodings, self._padding)

    def _check(self, text: object, index: int) -> None:
        if self._pair:
            if isinstance(text, tuple | list) and len(text) == 2 and all(isinstance(part, str) for part in text):
                return
            raise InputError(
                f"text {index}: found {_kind(text)}, expected a pair of texts: this bundle's task is on pairs"
            )
        if not isinstance(text, str):
            raise InputError(
                f"text {index}: found {_kind(text)}, expected a text: this bundle's task is on single texts"
            )

    def _not_unicode(self, texts: Sequence[Text]) -> InputError:
        for index, text in enumerate(texts):
            try:
                ("".join(text)).encode()
            except UnicodeEncodeError as error:
                return InputError(
                    f"text {index}: found half a surrogate pair at character {error.start}, expected Unicode text; "
                    "replace it"
                )
        return InputError("the tokenizer refused the texts; expected Unicode text")


def _kind(text: object) -> str:
    if isinstance(text, str):
        return "a single text"
    if isinstance(text, tuple | list):
        return f"a {type(text).__name__} of {len(text)}"
    return f"a {type(text).__name__}"
