"""A bundle's `tokenizer.json`: that of a checkpoint, which must give the tokens that transformers gives.

transformers changes what `tokenizer.json` says by `tokenizer_config.json`; the runtime has the one file alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cascade_train.settings import TOKENIZER_CONFIG, Settings, guarded
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from cascade_rt.errors import InputError

_EXPECTED = "expected config.json and tokenizer.json beside the ONNX file or in the folder above it"
_BERT_LIKE = ("bert", "distilbert", "electra", "convbert", "funnel", "layoutlm", "lxmert", "mobilebert", "squeezebert")
_NORMALIZER = {"lowercase": ("do_lower_case", True), "strip_accents": ("strip_accents", None)}
_CHINESE = {"handle_chinese_chars": ("tokenize_chinese_chars", True)}
_NORMALIZERS = dict.fromkeys(_BERT_LIKE, _NORMALIZER | _CHINESE) | {"mpnet": _NORMALIZER}
"""Per class of transformers, what it takes from tokenizer_config.json for a BertNormalizer, with the default."""

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_NO_LIMIT = 10**9
_TOKENS_TRIED = 40
_FEWEST = 16  # tokens that any pair's special ones leave room in
_TEXTS = (
    "The QUICK Brown Fox, isn't it? (1,234.56%)",
    "Café NAÏVE Zürich Ångström İstanbul straße ½ ﬁne",
    "cafe\u0301 nai\u0308ve",
    "中文 text 日本語",
    "  two spaces  between\tand\nlines \r\n",
    "zero\u200bwidth\u00a0space\ufeff, control \x07 and emoji 🙂",
    "a" * 130,
    "a",
    "",
)
"""Texts whose tokens the settings of tokenizers change: case, accents, spaces, Chinese, marks, long words."""


class Padding(NamedTuple):
    """The token that fills texts up."""

    token: str
    id: int
    type_id: int


def texts_for(backend: Tokenizer, pair: bool) -> Iterator[tuple[str, str | None]]:
    """Yield texts, or pairs, that show how tokenizers differ: also this one's added tokens, and long ones."""
    added = [token.content for token in backend.get_added_tokens_decoder().values()][:_TOKENS_TRIED]
    spelled = [f"a {token} b{token}c {token.upper()} {token.lower()}" for token in added]
    singles = [*_TEXTS, *spelled, " ".join(_TEXTS * 60)]
    for text, other in zip(singles, reversed(singles), strict=True):
        yield text, other if pair else None


def check_same_tokens(source: str, backend: Tokenizer, tokenizer: Any, max_length: int, pair: bool) -> None:
    """Raise InputError, which names a text, unless `backend` gives the ids and types of a tokenizer of transformers."""
    texts = list(texts_for(backend, pair))
    limit, direction = max(max_length, _FEWEST), backend.truncation["direction"]
    backend.enable_truncation(limit, direction=direction)
    ours = [backend.encode(text, other) for text, other in texts]
    backend.enable_truncation(max_length, direction=direction)
    firsts, seconds = [text for text, _ in texts], [str(other) for _, other in texts] if pair else None
    theirs = tokenizer(firsts, seconds, truncation=True, max_length=limit)  # in one call: alone, an empty pair is none
    for row, (text, _) in enumerate(texts):
        ids = theirs["input_ids"][row]
        types = theirs["token_type_ids"][row] if "token_type_ids" in theirs else ours[row].type_ids
        if (ours[row].ids, ours[row].type_ids) != (ids, types):
            found, expected = (" ".join(tokenizer.convert_ids_to_tokens(some[:8])) for some in (ours[row].ids, ids))
            raise InputError(
                f"{source}: tokenizer.json gives other tokens than transformers for {text[:30]!r} (found {found!r}, "
                f"expected {expected!r}): another file of the folder changes them; write them all again with "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )


def bundled(backend: Tokenizer, padding: Padding, max_length: int, cut: str, *, typed: bool) -> Tokenizer:
    """Return the tokenizer of a bundle: `backend` with its padding, and cut on one side, "left" or "right".

    `typed`: whether the model gets token types; without, all are 0. Padding is always on the right: on the left, the
    first token of a text would get another position than when it is alone.
    """
    written = json.loads(backend.to_str())
    if not typed:
        written["post_processor"] = _without_types(written["post_processor"])
    backend = Tokenizer.from_str(json.dumps(written))
    backend.enable_padding(
        direction="right", pad_id=padding.id, pad_type_id=padding.type_id if typed else 0, pad_token=padding.token
    )
    backend.enable_truncation(max_length, direction=cut)
    return backend


class TokenizerFile(NamedTuple):
    """`tokenizer.json` of a folder, as transformers reads it."""

    backend: Tokenizer
    padding: Padding
    cut: str
    """The side that is cut off, "left" or "right"."""
    typed: bool
    """True if models get token types."""


def read_tokenizer(settings: Settings, *, pad_id: int) -> TokenizerFile:
    """Read `tokenizer.json` as transformers would, from the JSON files alone.

    `pad_id`: that of config.json, for files that name no padding token. Raises InputError for files that contradict
    each other.
    """
    with guarded(settings.source, "cannot be opened", _EXPECTED):
        written = json.loads(Tokenizer.from_str((settings.folder / "tokenizer.json").read_text("utf-8")).to_str())
        _follow_normalizer(written, settings)
        _follow_prefix(written, settings)
        backend = Tokenizer.from_str(json.dumps(written))
        named = _special_tokens(settings)
        _check_added(backend, settings, named)
        return TokenizerFile(
            backend,
            _padding(backend, settings, named, pad_id),
            str(settings.tokenizer.get("truncation_side") or (backend.truncation or {}).get("direction") or "right"),
            "token_type_ids" in settings.tokenizer.get("model_input_names", ["token_type_ids"]),
        )


def longest(settings: Settings) -> int:
    """Return the tokens that tokenizer_config.json allows."""
    found = settings.tokenizer.get("model_max_length", settings.tokenizer.get("max_len"))
    return int(min(found, _NO_LIMIT)) if found else _NO_LIMIT


def _follow_normalizer(written: dict[str, Any], settings: Settings) -> None:
    normalizer = written["normalizer"] or {}
    if normalizer.get("type") != "BertNormalizer":
        return
    for key, (name, default) in _NORMALIZERS.get(_kind(settings), {}).items():
        normalizer[key] = settings.tokenizer.get(name, default)


def _follow_prefix(written: dict[str, Any], settings: Settings) -> None:
    if "add_prefix_space" in (written["pre_tokenizer"] or {}):
        written["pre_tokenizer"]["add_prefix_space"] = bool(settings.tokenizer.get("add_prefix_space", False))


def _kind(settings: Settings) -> str:
    """Return the stem of the tokenizer's class, lower case, which is also the model's type."""
    named = settings.tokenizer.get("tokenizer_class") or settings.config.get("tokenizer_class")
    kind = str(named or settings.config.get("model_type", "")).lower()
    return kind.removesuffix("fast").removesuffix("tokenizer")


def _special_tokens(settings: Settings) -> dict[str, str]:
    """Return the special tokens by role; special_tokens_map.json counts where no added tokens are listed."""
    named: dict[str, Any] = dict(settings.tokenizer)
    if "added_tokens_decoder" not in named:
        named |= settings.read(_SPECIAL_TOKENS_MAP)
    found = {role: named[role] for role in _ROLES if named.get(role)}
    found |= {str(at): token for at, token in enumerate(named.get("additional_special_tokens") or [])}
    return {role: str(token["content"] if isinstance(token, Mapping) else token) for role, token in found.items()}


def _check_added(backend: Tokenizer, settings: Settings, named: Mapping[str, str]) -> None:
    """Raise InputError for added tokens that only tokenizer_config.json knows, or knows otherwise."""
    flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    differing = [token for token in named.values() if token not in known]
    for token in (settings.tokenizer.get("added_tokens_decoder") or {}).values():
        same = known.get(token["content"])
        if same is None or any(getattr(same, flag) != token.get(flag, getattr(same, flag)) for flag in flags):
            differing.append(token["content"])
    if differing:
        raise InputError(
            f"{settings.source}: {TOKENIZER_CONFIG}: found added tokens that tokenizer.json has not, or otherwise "
            f"({', '.join(map(repr, differing[:5]))}); expected the same in both; write both again with "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )


def _padding(backend: Tokenizer, settings: Settings, named: Mapping[str, str], pad_id: int) -> Padding:
    before = backend.padding or {}
    token = named.get("pad_token") or before.get("pad_token") or "[PAD]"
    found = backend.token_to_id(token)
    type_id = settings.tokenizer.get("pad_token_type_id", before.get("pad_type_id", 0))
    return Padding(token, pad_id if found is None else found, int(type_id))


def _without_types(processor: Any) -> Any:
    """Return a post-processor, or a part of one, that gives all tokens the type 0."""
    if isinstance(processor, list):
        return [_without_types(part) for part in processor]
    if not isinstance(processor, dict):
        return processor
    if processor.get("type") == "BertProcessing":  # whose types are not written
        (begin, first), (end, last) = processor["cls"], processor["sep"]
        template = TemplateProcessing(f"{begin} $A {end}", f"{begin} $A {end} $B {end}", [(begin, first), (end, last)])
        return json.loads(template.__getstate__())
    return {key: 0 if key == "type_id" else _without_types(part) for key, part in processor.items()}
