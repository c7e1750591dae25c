"""Tiny random classifiers of every supported family, each with a tokenizer of its family's kind."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..conftest import LABELS, WORDS

POSITIONS = 48
_CORPUS = [" ".join(WORDS[start : start + 9]) for start in range(0, len(WORDS), 3)]
_SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.4}


def _wordpiece(special: tuple[str, str, str, str, str]) -> Any:
    from tokenizers import BertWordPieceTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*special, *WORDS, *".,!?'", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    pad, unknown, begin, end, _ = special
    return BertWordPieceTokenizer(
        vocabulary, unk_token=unknown, cls_token=begin, sep_token=end, pad_token=pad
    )._tokenizer


def _byte_pairs() -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        _CORPUS, vocab_size=320, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False
    )
    tokenizer._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer._tokenizer


def _unigram(begin: str, end: str, special: list[str], second_type: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    unknown = next(token for token in special if token.lower() in ("<unk>", "[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token=unknown, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:{second_type} {end}:{second_type}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (begin, end)],
    )
    return tokenizer


def _byte_fallback() -> Any:
    """Gemma's kind, which mmBERT has: spaces are a character, and what has no token falls back to bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special + of_bytes, show_progress=False)
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in _CORPUS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair="<bos> $A <eos> $B <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    return tokenizer


def _write(
    folder: Path, kind: str, backend: Any, special: dict[str, str], padding_side: str = "right", **more: Any
) -> Path:
    import torch
    from cascade_train.compat import quiet
    from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(1)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=10**9, padding_side=padding_side, **special
    )
    settings: dict[str, Any] = {
        **_SHAPE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": POSITIONS,
        "pad_token_id": tokenizer.pad_token_id,
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: index for index, label in enumerate(LABELS)},
    } | more
    config = AutoConfig.for_model(kind, **settings)
    with quiet():  # transformers 5 has a bar for it
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _modernbert(folder: Path, tokenizer: Any = None, names: dict[str, str] | None = None, **more: Any) -> Path:
    """As Ettin's: every second layer attends to 8 tokens on each side, far fewer than a text may have."""
    settings: dict[str, Any] = {
        "local_attention": 16,
        "global_attn_every_n_layers": 2,
        "initializer_cutoff_factor": 2.0,
        "bos_token_id": 0,
        "cls_token_id": 0,
        "eos_token_id": 2,
        "sep_token_id": 2,
    }
    return _write(folder, "modernbert", tokenizer or _byte_pairs(), names or _ROBERTA_NAMES, **{**settings, **more})


def _rotary(folder: Path, kind: str, **more: Any) -> Path:
    """EuroBERT and GTE, which transformers has since version 5."""
    return _write(folder, kind, _byte_pairs(), _ROBERTA_NAMES, bos_token_id=0, eos_token_id=2, **more)


_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_BERT_NAMES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
_ROBERTA_NAMES = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "mask_token": "<mask>",
}

FAMILIES: dict[str, Callable[..., Path]] = {
    "bert": lambda folder, **more: _write(folder, "bert", _wordpiece(_BERT), _BERT_NAMES, **more),
    "bert, padded on the left": lambda folder: _write(folder, "bert", _wordpiece(_BERT), _BERT_NAMES, "left"),
    "minilm (12 heads of 4)": lambda folder: _write(
        folder, "bert", _wordpiece(_BERT), _BERT_NAMES, hidden_size=48, num_attention_heads=12
    ),
    "distilbert": lambda folder: _write(
        folder, "distilbert", _wordpiece(_BERT), _BERT_NAMES, dim=32, hidden_dim=64, n_layers=2, n_heads=4
    ),
    "electra": lambda folder: _write(folder, "electra", _wordpiece(_BERT), _BERT_NAMES, embedding_size=16),
    "albert": lambda folder: _write(
        folder,
        "albert",
        _unigram("[CLS]", "[SEP]", ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"], 1),
        {
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
        embedding_size=16,
    ),
    "roberta": lambda folder: _write(
        folder, "roberta", _byte_pairs(), _ROBERTA_NAMES, max_position_embeddings=POSITIONS + 2, type_vocab_size=1
    ),
    "xlm-roberta": lambda folder, **more: _write(
        folder,
        "xlm-roberta",
        _unigram("<s>", "</s>", _ROBERTA, 0),
        _ROBERTA_NAMES,
        max_position_embeddings=POSITIONS + 2,
        type_vocab_size=1,
        **more,
    ),
    "mpnet": lambda folder: _write(
        folder,
        "mpnet",
        _wordpiece(("<s>", "<pad>", "</s>", "[UNK]", "<mask>")),
        {"pad_token": "<pad>", "unk_token": "[UNK]", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"},
        max_position_embeddings=POSITIONS + 2,
    ),
    "multilingual e5 (bert)": lambda folder, **more: _write(
        folder, "bert", _unigram("<s>", "</s>", _ROBERTA, 0), _ROBERTA_NAMES, classifier_dropout=0.3, **more
    ),
    "modernbert": _modernbert,
    "modernbert, mean pooling": lambda folder, **more: _modernbert(
        folder, classifier_pooling="mean", classifier_dropout=0.3, norm_bias=True, **more
    ),
    "modernbert, window longer than any text": lambda folder, **more: _modernbert(folder, local_attention=128, **more),
    "mmbert (modernbert)": lambda folder, **more: _modernbert(
        folder,
        _byte_fallback(),
        {
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "cls_token": "<bos>",
            "sep_token": "<eos>",
            "mask_token": "<mask>",
        },
        bos_token_id=2,
        cls_token_id=2,
        eos_token_id=1,
        sep_token_id=1,
        classifier_pooling="mean",
        **more,
    ),
    "deberta-v2": lambda folder: _write(
        folder,
        "deberta-v2",
        _unigram("[CLS]", "[SEP]", ["[PAD]", "<unk>", "[CLS]", "[SEP]", "[MASK]"], 1),
        {**_BERT_NAMES, "unk_token": "<unk>"},
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        type_vocab_size=0,
    ),
    "deberta-v3 (deberta-v2)": lambda folder, **more: _write(
        folder,
        "deberta-v2",
        _unigram("[CLS]", "[SEP]", ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"], 1),
        _BERT_NAMES,
        relative_attention=True,
        position_buckets=256,
        max_relative_positions=-1,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        type_vocab_size=0,
        pooler_dropout=0,
        pooler_hidden_act="gelu",
        **more,
    ),
}
"""Name -> a function that writes such a classifier, two layers deep, into a folder and returns it."""

if find_spec("transformers.models.eurobert"):
    FAMILIES |= {
        "eurobert": lambda folder, **more: _rotary(folder, "eurobert", **more),
        "eurobert, first token": lambda folder, **more: _rotary(folder, "eurobert", classifier_pooling="bos", **more),
        "eurobert, shared keys": lambda folder, **more: _rotary(
            folder, "eurobert", classifier_pooling="mean", num_key_value_heads=2, **more
        ),
    }
if find_spec("transformers.models.gte"):
    FAMILIES["gte"] = lambda folder, **more: _rotary(folder, "gte", **more)
