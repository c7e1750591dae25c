"""The six GLUE tasks in their official layouts, labelled files and splits."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from cascade_train.tasks import GLUE, Examples, hold_out, load_evaluation, load_file, load_task

from cascade_rt.cli import main
from cascade_rt.errors import InputError
from cascade_rt.io.readers import Reading

MNLI_HEADER = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
    "sentence1 sentence2 label1 gold_label"
)


def write_table(path: Path, header: str, rows: list[list[str]], mark: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(header.split(" ")), *("\t".join(row) for row in rows)]
    path.write_text(mark + "\n".join(lines) + "\n", "utf-8")


def _mnli(label: str, index: int) -> list[str]:
    return [
        str(index),
        "p",
        "q",
        "fiction",
        "( a )",
        "( b )",
        "(A)",
        "(B)",
        f"one {index}",
        f"two {index}",
        label,
        label,
    ]


LAYOUTS: dict[str, tuple[str, Callable[[str, int], list[str]], str, list[str]]] = {
    "mnli": (MNLI_HEADER, _mnli, "train.tsv", ["entailment", "neutral", "contradiction"]),
    "mrpc": (
        "Quality #1_ID #2_ID #1_String #2_String",
        lambda label, index: [label, "1", "2", f'he said "no {index}', f"two {index}"],
        "msr_paraphrase_train.txt",
        ["0", "1"],
    ),
    "qnli": (
        "index question sentence label",
        lambda label, index: [str(index), f"who {index}?", f"she {index}", label],
        "train.tsv",
        ["entailment", "not_entailment"],
    ),
    "qqp": (
        "id qid1 qid2 question1 question2 is_duplicate",
        lambda label, index: [str(index), "1", "2", f"why {index}?", f"how {index}?", label],
        "train.tsv",
        ["0", "1"],
    ),
    "rte": (
        "index sentence1 sentence2 label",
        lambda label, index: [str(index), f"one {index}", f"two {index}", label],
        "train.tsv",
        ["entailment", "not_entailment"],
    ),
    "sst-2": ("sentence label", lambda label, index: [f"text {index}", label], "train.tsv", ["0", "1"]),
}


@pytest.mark.parametrize("name", GLUE)
def test_official_layouts_are_read(tmp_path: Path, name: str) -> None:
    header, row, file, labels = LAYOUTS[name]
    rows = [row(labels[index % len(labels)], index) for index in range(30)]
    write_table(tmp_path / file, header, rows, mark="\ufeff" if name == "mrpc" else "")
    if name == "mrpc":
        content = (tmp_path / file).read_text("utf-8")
        (tmp_path / file).write_text(content.replace("_ID", " ID").replace("_String", " String"), "utf-8")
    if name == "qqp":  # its official file has rows with too few fields
        with (tmp_path / file).open("a") as stream:
            stream.write("31\t1\t2\tbroken\n")
    data = load_task(name, tmp_path, holdout=0.2)
    assert (len(data.train), len(data.validation)) == (24, 6)
    assert data.pair == (name != "sst-2")
    assert data.metric == ("f1" if name in ("mrpc", "qqp") else "accuracy")
    assert len(data.labels) == len(labels)
    assert set(data.train.labels) == set(range(len(labels)))
    text = data.train.texts[0]
    assert isinstance(text, tuple) == data.pair
    if name == "mnli":
        write_table(tmp_path / "dev_matched.tsv", header, [row("neutral", 1), row("-", 2)])
        write_table(tmp_path / "dev_mismatched.tsv", header, [row("entailment", 3)])
        dev = load_evaluation(name, tmp_path)
        assert {split: examples.labels for split, examples in dev.items()} == {
            "dev_matched": [1],
            "dev_mismatched": [0],
        }
        assert dev["dev_matched"].texts == [("one 1", "two 1")]


def test_the_split_is_stratified_seeded_and_loses_nothing() -> None:
    examples = Examples([f"text {index}" for index in range(200)], [int(index % 4 == 0) for index in range(200)])
    kept, held = hold_out(examples, 0.1, seed=3)
    assert sorted([*kept.texts, *held.texts]) == sorted(examples.texts)
    assert Counter(held.labels) == {0: 15, 1: 5}
    assert hold_out(examples, 0.1, seed=3)[1].digest() == held.digest()
    assert hold_out(examples, 0.1, seed=4)[1].digest() != held.digest()


def test_nested_texts_are_held_out_with_all_their_phrases() -> None:
    sentences = [f"the film number {index} was good fun" for index in range(20)]
    phrases = [phrase for index in range(20) for phrase in (f"number {index} was good", f"the film number {index}")]
    examples = Examples([*sentences, *phrases, "was good"], [0, 1] * 10 + [0, 1] * 20 + [1])
    kept, held = hold_out(examples, 0.2, seed=0, nested=True)
    assert len(held) == 4
    assert set(held.texts) <= set(sentences)
    for sentence in held.texts:
        assert not [text for text in kept.texts if re.search(rf"(^| ){re.escape(str(text))}( |$)", str(sentence))]
    assert len(kept) == 16 * 3


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_any_labelled_file_is_read(tmp_path: Path, ending: str) -> None:
    rows = [(f"text {index}", ["10", "9", "2"][index % 3]) for index in range(30)]
    lines = {
        "csv": ["q,y", *(f'"{text}",{label}' for text, label in rows)],
        "tsv": ["q\ty", *(f"{text}\t{label}" for text, label in rows)],
        "jsonl": [f'{{"q": "{text}", "y": {label}}}' for text, label in rows],
    }[ending]
    (tmp_path / f"data.{ending}").write_text("\n".join(lines))
    data = load_file(tmp_path / f"data.{ending}", reading=Reading(columns=("q",), label_column="y"), holdout=0.2)
    assert data.labels == ("2", "9", "10")
    assert (len(data.train), len(data.validation), data.pair, data.name) == (24, 6, False, "data")
    names = dict(rows)
    assert all(
        data.labels[label] == names[str(text)] for text, label in zip(data.train.texts, data.train.labels, strict=True)
    )


def test_a_validation_file_is_used_whole(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "dev.csv").write_text("text,label\nc,y\n")
    data = load_file(tmp_path / "train.csv", validation=tmp_path / "dev.csv")
    assert (len(data.train), data.validation.texts, data.validation.labels) == (2, ["c"], [1])
    (tmp_path / "dev.csv").write_text("text,label\nc,z\n")
    with pytest.raises(InputError, match="found the label 'z'"):
        load_file(tmp_path / "train.csv", validation=tmp_path / "dev.csv")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([-1, 1, 0], ("-1", "0", "1")),
        ([1, 1.0, 0, 0.0, -0.0], ("0", "1")),
        (["01", "1", "1.0", "2", "1e0"], ("01", "1", "1.0", "1e0", "2")),
        (["10", "x", ".5", "-3", "1e1"], ("-3", ".5", "10", "1e1", "x")),
        (["pos", "pos ", "\tneg", "neg"], ("neg", "pos")),
        ([True, False], ("False", "True")),
        ([0.5, 2, "two"], ("0.5", "2", "two")),
    ],
)
def test_class_ids_follow_one_rule(tmp_path: Path, labels: list[object], names: tuple[str, ...]) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"text": "z", "label": labels[0]}))
    for order in (labels, labels[::-1]):
        rows = [{"text": f"text {row}", "label": label} for row, label in enumerate(order)]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = load_file(tmp_path / "data.jsonl", validation=held)
        assert data.labels == names
        assert len(data.train) == len(labels)


@pytest.mark.parametrize(
    ("label", "says"),
    [
        (
            ["a", "b"],
            r"holds a list \(\['a', 'b'\]\), expected one label; keep one of them, or, where texts have several",
        ),
        ({"a": 1}, r"holds an object \(\{'a': 1\}\), expected one label"),
        (["x" * 500], r"holds a list \(.{80}\), expected one label"),
        (float("nan"), "column 'label' is empty"),
        (" ", "column 'label' is empty"),
    ],
)
def test_what_is_no_label_is_named_with_its_position(tmp_path: Path, label: object, says: str) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": label}, {"text": "c", "label": "y"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=r"data\.jsonl:2: column 'label' (holds|is).*") as caught:
        load_file(tmp_path / "data.jsonl")
    assert re.search(says, str(caught.value))


def test_a_column_that_holds_no_labels_is_named(tmp_path: Path) -> None:
    rows = [{"text": f"text {row}", "label": f"id {row}"} for row in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="found 60 different labels in 60 rows of the column 'label'") as caught:
        load_file(tmp_path / "data.jsonl")
    assert len(str(caught.value)) < 400
    few = {"text": "a", "label": "id 3"}
    (tmp_path / "held.jsonl").write_text(json.dumps(few))
    data = load_file(tmp_path / "data.jsonl", validation=tmp_path / "held.jsonl")  # one text of each label may be meant
    assert len(data.labels) == 60
    (tmp_path / "held.jsonl").write_text(json.dumps(few | {"label": "ID-3"}))
    with pytest.raises(InputError, match=r"held.jsonl:1: found the label 'ID-3'.*60 labels\); did you mean 'id 3'"):
        load_file(tmp_path / "data.jsonl", validation=tmp_path / "held.jsonl")


def test_data_that_cannot_be_learnt_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`task`: found 'cola', expected one of mnli"):
        load_task("cola", tmp_path)
    with pytest.raises(InputError, match=r"found no train\.tsv"):
        load_task("rte", tmp_path)
    with pytest.raises(InputError, match="this task reads its official files: give their folder"):
        load_task("rte", None)
    write_table(tmp_path / "train.tsv", "sentence label", [["a", "0"], ["b", "2"]])
    with pytest.raises(InputError, match=r"train\.tsv:3: found the label '2', expected one of 0, 1"):
        load_task("sst-2", tmp_path)
    (tmp_path / "one.csv").write_text("text,label\na,x\nb,x\n")
    with pytest.raises(InputError, match="at least two different"):
        load_file(tmp_path / "one.csv")
    (tmp_path / "few.csv").write_text("text,label\na,x\nb,y\n")
    with pytest.raises(InputError, match="cannot hold out"):
        load_file(tmp_path / "few.csv")
    with pytest.raises(InputError, match="between 0 and 1"):
        load_task("smart-home", None, holdout=1.0)


_ROWS = [
    (
        "a.csv",
        "text,label\na,x\n,y\nb,\nc,y\nd\n",
        ["found an empty text", "column 'label' is empty", "found 1 fields"],
    ),
    (
        "a.jsonl",
        '{"text": "a", "label": "x"}\n{"text": "b", "label": null}\n{"text": " ", "label": "y"}\n{"text": "c"}\n{\n'
        '{"text": "d", "label": "y"}\n',
        ["column 'label' is empty", "found an empty text", "no column 'label'", "not JSON"],
    ),
]


@pytest.mark.parametrize(("name", "content", "says"), _ROWS)
def test_rows_without_text_or_label_are_refused_or_left_out(
    tmp_path: Path, name: str, content: str, says: list[str]
) -> None:
    (tmp_path / name).write_text(content * 1)
    held = tmp_path / "held.jsonl"
    held.write_text('{"text": "a", "label": "x"}\n')
    with pytest.raises(InputError, match=rf"{name}:[23]: {says[0]}"):
        load_file(tmp_path / name, validation=held)
    skipped: list[str] = []
    data = load_file(tmp_path / name, validation=held, skipped=skipped)
    assert data.labels == ("x", "y")
    assert len(data.train) == 2
    assert len(skipped) == len(says)
    assert all(wanted in found for wanted, found in zip(says, skipped, strict=True))


def test_the_command_counts_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.csv").write_text("text,label\n" + "a,x\nb,y\n" * 9 + ",x\nc,\n")
    for more, says in (
        ([], "data.csv:20: found an empty text; leave the row out"),
        (["--on-error", "skip"], "2 rows were left out, the first: data.csv:20: found an empty text"),
    ):
        assert main(["train", "--train-file", "data.csv", "--base", "nowhere", "--output", "m", *more]) == 2
        assert says in capsys.readouterr().err


def test_a_file_of_a_spreadsheet_is_read_as_the_options_say(tmp_path: Path) -> None:
    rows = "".join(f'"f\u00fcr {at}, mit Komma";{"xy"[at % 2]}\r\n' for at in range(20))
    (tmp_path / "a.dat").write_bytes(f"Satz;Klasse\r\n{rows}".encode("cp1252"))
    reading = Reading("csv", ("Satz",), "Klasse", encoding="cp1252")
    data = load_file(tmp_path / "a.dat", reading=reading)
    assert (data.labels, len(data.train) + len(data.validation)) == (("x", "y"), 20)
    assert set(data.train.texts) <= {f"f\u00fcr {at}, mit Komma" for at in range(20)}


def test_a_quote_that_is_not_closed_stops_training_or_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.csv").write_text("text,label\n" + "a,x\nb,y\n" * 9 + '"c,x\n' + "a,x\nb,y\n" * 9)
    for more, says in (
        ([], "data.csv:20: malformed CSV: a quote opens in this line and is not closed"),
        (["--on-error", "skip"], "1 rows were left out, the first: data.csv:20: malformed CSV"),
    ):
        assert main(["train", "--train-file", "data.csv", "--base", "nowhere", "--output", "m", *more]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("text,label\na,x\nb,y\n", "cannot hold out 10% of 2 examples with each of the 2 labels .*rarest label has 1"),
        ("text,label\na,x\nb,x\n", r"found the label\(s\) x, expected at least two"),
        ("text,label\n", r"found the label\(s\) none, expected at least two"),
        ("text,label\n,x\n", "found an empty text"),
    ],
)
def test_too_little_data_is_said_in_our_words(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError, match=says) as caught:
        load_file(tmp_path / "a.csv")
    assert caught.value.__cause__ is None
