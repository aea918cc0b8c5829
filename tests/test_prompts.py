"""Prompt sets: what is refused, by file and line, what is assumed and said, what a round trip keeps."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_engine.prompt_choice import choose_prompts
from grpo_engine.prompt_rows import KINDS, Kind
from grpo_engine.prompts import (
    MAX_FILE_BYTES,
    SPLITS,
    TIERS,
    Prompt,
    PromptError,
    PromptSet,
    Split,
    load_prompts,
    normalize,
    parse_prompts,
    save_prompts,
    split_of,
)

GENERAL = Path(__file__).parents[1] / "configs" / "prompts" / "general.jsonl"

# Printable text: no control characters, surrogates or line separators, and something to see.
TEXTS = (
    st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=40)
    .map(lambda text: text.strip("\ufeff \u00a0\u1680\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))))
    .filter(lambda text: any(char.isalnum() for char in text))
)
DISTINCT_TEXTS = st.lists(TEXTS, min_size=1, max_size=12, unique_by=normalize)


def jsonl(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parse(data: bytes, kind: Kind = "jsonl", **limits: Any) -> PromptSet:
    return parse_prompts(data, name=f"set.{kind}", kind=kind, **limits)


def refusal(data: bytes, kind: Kind = "jsonl", **limits: Any) -> str:
    with pytest.raises(PromptError) as caught:
        parse(data, kind, **limits)
    return str(caught.value)


def record(text: str, split: str = "train", **more: Any) -> dict[str, Any]:
    return {"text": text, "tier": "basic", "split": split, **more}


# --- Refusals: each names the file, the line and the way out -----------------------------------------------


@pytest.mark.parametrize(
    ("second_line", "said"),
    [
        (b'{"text": "a dog"', "not valid JSON at column 17"),
        (b'{"text": NaN}', "not valid JSON (NaN is no JSON number)"),
        (b'{"text": "a dog", "text": "a cat"}', "the key 'text' stands twice"),
        (b'{"text": "a \\ud800 dog"}', "half of a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "a dog", "n": ' + b"9" * 5_000 + b"}", "not valid JSON"),
        (b'["a dog"]', "is not a JSON object but ['a dog']"),
        (b"{}", "has no text"),
        (b'{"tier": "basic"}', "has no text"),
        (b'{"text": null}', "has no text"),
        (b'{"text": " \\t\\n"}', "has no text"),
        (b'{"text": "\\u200b\\u200b"}', "has no text"),
        (b'{"text": 7}', '"text" must be a string, not 7'),
        (b'{"text": "a dog", "id": 7}', '"id" must be a string, not 7'),
        (b'{"text": "a dog", "tier": ["basic"]}', "\"tier\" must be a string, not ['basic']"),
        (b'{"text": "a dog", "split": false}', '"split" must be a string, not False'),
        (b'{"text": "a\\u0000dog"}', "control character, U+0000 at position 2"),
        (b'{"text": "a dog\\nand a cat"}', "control character, U+000A at position 6"),
        (b'{"text": "a dog\\u2028and a cat"}', "control character, U+2028 at position 6"),
        (b'{"text": "a dog", "tier": "hard"}', "'hard' is no tier; use basic, challenging or complex"),
        (b'{"text": "a dog", "split": "val"}', "'val' is no split; use train, validation or test"),
        (b'{"text": "a dog", "id": "../dog"}', "the id '../dog' is refused"),
        (b'{"text": "a dog", "id": "cat-1"}', "the id 'cat-1' is taken by line 1"),
        (b'{"text": "A CAT! ", "split": "train"}', "'A CAT!' is the prompt of line 1 again"),
        (b'{"text": "a  cat", "split": "test"}', "in split test and, at line 1, in split train"),
    ],
)
def test_a_bad_jsonl_line_is_refused_by_file_and_line(second_line: bytes, said: str) -> None:
    if sys.version_info < (3, 11) and b"9" * 5_000 in second_line:
        pytest.skip("only later Pythons bound the digits of a number")
    first_line = json.dumps(record("a cat", id="cat-1")).encode() + b"\n"
    message = refusal(first_line + second_line)
    assert message.startswith("set.jsonl, line 2: ")
    assert said in message
    assert message.count("\n") == 0 and message.endswith(".")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"text\na cat\na dog, asleep\n", "line 3: has 2 fields for 1 columns; quote texts"),
        (b'text\na cat\n"a dog" asleep\n', "line 3: not valid CSV"),
        (b'text\na cat\n"a dog\n', "line 3: not valid CSV"),
        (b'text,tier\na cat,basic\n"a\ndog",basic\nan ox,hard\n', "line 5: 'hard' is no tier"),
        (b"text,tier\na cat,basic\n,basic\n", "line 3: has no text"),
        (b"prompt;tier\na cat;basic\n", "line 1: no column is named \"text\" (found: 'prompt;tier')"),
        (b"text,note,note\na cat,1,2\n", "line 1: the header names the column 'note' twice"),
        (b"text,,note\na cat,1,2\n", "line 1: the header leaves a column without a name"),
        (b"text\na\x00cat\n", "line 2: the text has a control character, U+0000"),
        (b"text\n" + b"x" * 200_000, "line 2: not valid CSV"),
    ],
)
def test_a_bad_csv_row_is_refused_by_file_and_line(data: bytes, said: str) -> None:
    assert f"set.csv, {said}" in refusal(data, "csv")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"a cat\n\nA cat.\n", "line 3: 'A cat.' is the prompt of line 1 again"),
        (b"a cat\na\tdog\n", "line 2: the text has a control character, U+0009 at position 2"),
        (b"a cat\n\xe2\x80\x8b\n", "line 2: has no text"),
    ],
)
def test_a_bad_text_line_is_refused_by_file_and_line(data: bytes, said: str) -> None:
    assert refusal(data, "txt").startswith(f"set.txt, {said}")


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_bytes_that_are_not_utf8_are_refused_by_line_and_offset(newline: bytes, mark: bytes) -> None:
    data = mark + "a café".encode() + newline + b"a caf\xe9"
    offset = data.index(b"\xe9", -1)
    assert refusal(data, "txt").startswith(f"set.txt, line 2: byte 0xe9 at offset {offset} is not UTF-8; save")


def test_the_length_limit_is_exact_and_named() -> None:
    assert len(parse(b"x" * 12, "txt", max_chars=12)) == 1
    assert "line 1: the text has 13 characters, the limit is 12;" in refusal(b"x" * 13, "txt", max_chars=12)


def test_the_token_limit_is_asked_of_every_text() -> None:
    def words(text: str) -> tuple[int, int]:
        return len(text.split()), 3

    assert len(parse(b"one two three\n", "txt", token_limit=words)) == 1
    message = refusal(b"one two three\none two three four\n", "txt", token_limit=words)
    assert message == "set.txt, line 2: the text has 4 tokens, the model reads at most 3; shorten it."


def test_the_most_prompts_of_a_set_are_counted_without_empty_lines() -> None:
    assert len(parse(b"a cat\n\na dog\n", "txt", max_prompts=2)) == 2
    message = refusal(b"a cat\n\na dog\nan ox\na cow\n", "txt", max_prompts=2)
    assert message == "set.txt, line 4: more than 2 prompts; divide the set."


@pytest.mark.parametrize("data", [b"", b"\n \n\t\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_prompts_is_refused(data: bytes, kind: Kind) -> None:
    assert refusal(data, kind) == f"set.{kind} holds no prompts; write at least one."


def test_a_csv_file_of_a_header_alone_is_refused() -> None:
    assert refusal(b"text,tier\n", "csv") == "set.csv holds no prompts; write at least one."


def test_all_mistakes_of_a_file_are_found_and_the_first_five_are_shown() -> None:
    with pytest.raises(PromptError) as caught:
        parse(jsonl(record("a cat"), *[{"text": ""}] * 6, "a string"))
    assert [re.findall(r"line (\d+)", problem) for problem in caught.value.problems] == [
        [str(line)] for line in range(2, 9)
    ]
    shown = str(caught.value).split("\n")
    assert shown == [*caught.value.problems[:5], "and 2 more"]


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    for path, said in [
        (tmp_path / "none.jsonl", "none.jsonl does not exist"),
        (folder, "folder.jsonl is a folder"),
        (
            tmp_path / "set.parquet",
            'set.parquet ends in ".parquet"; a prompt set is a .jsonl, .txt or .csv file',
        ),
        (tmp_path / "prompts", "prompts has no extension"),
        (tmp_path / "a\0b.txt", "cannot be read"),
        (folder / "inner" / ".." / ".." / "none.txt", "none.txt does not exist"),
    ]:
        with pytest.raises(PromptError, match=re.escape(said)):
            load_prompts(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    with pytest.raises(PromptError, match="is not a regular file"):
        load_prompts(pipe)


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    with path.open("wb") as handle:
        handle.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(PromptError, match=r"large\.txt is larger than 20 MB"):
        load_prompts(path)


def test_names_of_splits_tiers_and_kinds_are_checked() -> None:
    prompts = parse(jsonl(record("a cat")))
    with pytest.raises(PromptError, match="'dev' is no split; use train, validation or test"):
        prompts.split("dev")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="'easy' is no tier; use basic, challenging or complex"):
        prompts.tier("easy")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="'xml' is no kind; use jsonl, txt or csv"):
        parse(b"", "xml")  # type: ignore[arg-type]


# --- What is accepted, and what is said about it -----------------------------------------------------------


def test_a_full_record_is_taken_as_it_is_and_leaves_nothing_to_report() -> None:
    scene = {"objects": [{"shape": "circle", "color": "red"}]}
    lines = [
        {"id": "a-1", "text": " A scarlet disc ", "tier": "Basic", "split": "TRAIN", "scene": scene, "n": 3},
        {"id": "a-2", "text": "a golden star", "tier": "complex", "split": "validation"},
        {"id": "a-3", "text": "a navy box", "tier": "challenging", "split": "test"},
    ]
    prompts = parse(jsonl(*lines))
    assert prompts.prompts == (
        Prompt("a-1", "A scarlet disc", "basic", "train", {"scene": scene, "n": 3}),
        Prompt("a-2", "a golden star", "complex", "validation"),
        Prompt("a-3", "a navy box", "challenging", "test"),
    )
    assert prompts.report == ()
    assert len(prompts) == 3
    assert [prompt.id for prompt in prompts.split("validation")] == ["a-2"]
    assert [prompt.id for prompt in prompts.tier("challenging")] == ["a-3"]
    assert prompts.counts() == {
        "train": {"basic": 1, "challenging": 0, "complex": 0},
        "validation": {"basic": 0, "challenging": 0, "complex": 1},
        "test": {"basic": 0, "challenging": 1, "complex": 0},
    }


def test_a_text_file_has_no_comments_and_any_line_ending() -> None:
    data = b"\xef\xbb\xbf# one red balloon\r\n  a dog  \ra cow"
    assert [prompt.text for prompt in parse(data, "txt").prompts] == ["# one red balloon", "a dog", "a cow"]


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("jsonl", b'\xef\xbb\xbf{"text": "a cat"}\n{"text": "a dog"}'),
        ("csv", b'\xef\xbb\xbf"text"\n"a cat"\n"a dog"'),
        ("txt", b"\xef\xbb\xbfa cat\n\xef\xbb\xbfa dog"),  # two files joined into one
    ],
)
def test_byte_order_marks_are_no_part_of_the_prompts(kind: Kind, data: bytes) -> None:
    assert [prompt.text for prompt in parse(data, kind).prompts] == ["a cat", "a dog"]


def test_csv_columns_may_stand_in_any_order_and_case_and_carry_more() -> None:
    data = b'Mood,Split,TEXT,id,Tier,\r\ncalm,train,"a cat, asleep",c1,complex,\r\n,train,a dog,c2,,\r\n'
    prompts = parse(data, "csv")
    assert prompts.prompts == (
        Prompt("c1", "a cat, asleep", "complex", "train", {"Mood": "calm"}),
        Prompt("c2", "a dog", "basic", "train"),
    )
    assert 'set.csv: line 3 without tier, taken as "basic".' in prompts.report


def test_every_assumption_is_reported_with_file_and_line() -> None:
    report = parse(b"a cat\n\na dog\n \na tall ship\na cow\nan owl\nan eel\n", "txt").report
    assert report[0] == "set.txt: lines 2, 4 empty, skipped."
    assert report[1] == "set.txt: lines 1, 3, 5, 6, 7 and 1 more without id, derived from a hash of the text."
    assert report[2] == 'set.txt: lines 1, 3, 5, 6, 7 and 1 more without tier, taken as "basic".'
    assert report[3].startswith("set.txt: lines 1, 3, 5, 6, 7 and 1 more without split, assigned by a hash")


def test_a_set_may_be_for_measuring_only() -> None:
    found = parse(jsonl(record("a cat", "test", id="c"), record("a dog", "validation", id="d")))
    assert found.counts()["train"] == dict.fromkeys(TIERS, 0)
    assert found.report == ("set.jsonl: no prompt is in split train.",)


def test_splits_without_prompts_are_reported() -> None:
    report = parse(jsonl(record("a cat", id="c"))).report
    assert report == (
        "set.jsonl: no prompt is in split validation.",
        "set.jsonl: no prompt is in split test.",
    )


def test_the_same_words_in_another_order_across_splits_are_a_warning() -> None:
    data = jsonl(
        record("a red cube on a blue ball", id="1"),
        record("a blue cube on a red ball", "test", id="2"),
        record("a blue ball on a red cube", id="3"),
        record("a green cube", "validation", id="4"),
    )
    assert parse(data).report == (
        "set.jsonl, line 2: 'a blue cube on a red ball' (split test) has the same words as line 1 (split train).",
        "set.jsonl, line 3: 'a blue ball on a red cube' (split train) has the same words as line 2 (split test).",
    )


def test_many_warnings_are_summed_up() -> None:
    pairs = [(record(f"red box {n}"), record(f"box red {n}", "test")) for n in range(8)]
    report = parse(jsonl(*itertools.chain.from_iterable(pairs), record("a dog", "validation"))).report
    assert sum("has the same words" in note for note in report) == 5
    assert report[-1] == "set.jsonl: 3 more such pairs."


def test_assumed_splits_are_near_70_10_20_and_depend_on_the_text_alone() -> None:
    splits = [split_of(f"prompt number {n}") for n in range(5_000)]
    shares: tuple[tuple[Split, float], ...] = (("train", 0.7), ("validation", 0.1), ("test", 0.2))
    for split, share in shares:
        assert splits.count(split) / 5_000 == pytest.approx(share, abs=0.02)  # above three standard deviations
    alone = {prompt.text: prompt for prompt in parse(b"a cat\na dog\nan owl\n", "txt").prompts}
    among = {prompt.text: prompt for prompt in parse(b"an ox\nan owl\na cow\na cat\na dog\n", "txt").prompts}
    for text in alone:
        assert (alone[text].split, alone[text].id) == (split_of(text), among[text].id)
        assert alone[text].split == among[text].split


def test_assumed_ids_and_splits_never_change_between_versions() -> None:
    # Recorded runs refer to them. SHA-256 of "id:a cat" and of "split:...", checked with a command-line tool.
    cat, *rest = parse(b"A cat.\na dog\na tall ship\n", "txt").prompts
    assert cat.id == "p-f1d6be58f523"
    assert [prompt.split for prompt in (cat, *rest)] == ["test", "train", "validation"]


def test_a_small_set_always_has_something_to_train_on() -> None:
    unlucky = [text for text in (f"prompt {n}" for n in range(40)) if split_of(text) == "test"][:3]
    prompts = parse("\n".join(unlucky).encode(), "txt")
    assert [prompt.text for prompt in prompts.prompts] == unlucky
    assert Counter(prompt.split for prompt in prompts.prompts) == {"train": 1, "test": 2}
    line = 1 + [prompt.split for prompt in prompts.prompts].index("train")
    assert any(note.startswith(f"set.txt, line {line}: moved to split train") for note in prompts.report)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("A  Red\u00a0CAT ...", "a red cat"),
        ("Straße", "strasse"),
        ("cafe\u0301", "café"),
        ("ﬁr tree", "fir tree"),
        ("a cat (asleep)!", "a cat (asleep"),
        ("?!", "?!"),
    ],
)
def test_texts_that_read_alike_normalize_alike(text: str, same: str) -> None:
    assert normalize(text) == same


# --- Fingerprint and round trips ---------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_content_not_of_the_file() -> None:
    lines = [record("a cat", id="1", mood="calm", by="me"), record("a dog", "test", id="2", mood="wild")]
    as_csv = b"by,mood,id,text,tier,split\nme,calm,1,a cat,basic,train\n,wild,2,a dog,basic,test\n"
    fingerprint = parse(jsonl(*lines)).fingerprint()
    assert re.fullmatch(r"[0-9a-f]{64}", fingerprint)
    assert parse(as_csv, "csv").fingerprint() == fingerprint
    changes = [{"id": "3"}, {"text": "a fox"}, {"tier": "complex"}, {"split": "validation"}, {"mood": "sad"}]
    changed = [parse(jsonl(lines[0], lines[1] | change)).fingerprint() for change in changes]
    reordered = parse(jsonl(*reversed(lines))).fingerprint()
    assert len({fingerprint, reordered, *changed}) == len(changes) + 2


def test_a_saved_set_loads_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "Set.JSONL"
    lines = [
        record("a café by the sea", id="1", scene={"n": [1, 2.5, None]}),
        record("a dog", "test", id="2"),
    ]
    saved = parse(jsonl(*lines))
    save_prompts(saved, path)
    loaded = load_prompts(path)
    assert loaded.prompts == saved.prompts
    assert loaded.fingerprint() == saved.fingerprint()
    assert (loaded.name, loaded.path) == ("Set", path)
    assert "café" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["Set.JSONL"]


def test_a_set_read_with_wider_limits_can_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "wide.jsonl"
    data = b"x" * 900 + b"".join(b"\nprompt %d" % n for n in range(10_000))
    wide = parse(data, "txt", max_chars=900, max_prompts=10_001)
    save_prompts(wide, path)
    assert load_prompts(path, max_chars=900, max_prompts=10_001).prompts == wide.prompts


@pytest.mark.skipif(os.name != "posix", reason="elsewhere an open file cannot be replaced")
def test_saving_replaces_the_file_and_never_rewrites_it(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        save_prompts(parse(jsonl(record("a cat"))), path)
        assert reader.read() == b"old"
    assert load_prompts(path).prompts[0].text == "a cat"


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ((), "holds no prompts"),
        ((Prompt("1", "a cat", "basic", "train"), Prompt("2", "A cat", "basic", "test")), "line 2"),
        ((Prompt("1", "a cat", "hard", "train"),), "line 1: 'hard' is no tier"),  # type: ignore[arg-type]
        (
            (Prompt("1", "a cat", "basic", "train", {"scene": object()}),),
            "prompt '1' cannot be written as JSON",
        ),
        ((Prompt("1", "a cat", "basic", "train", {"score": float("nan")}),), "prompt '1' cannot be written"),
        ((Prompt("1", "a \ud800", "basic", "train"),), "prompt '1' cannot be written as JSON"),
    ],
)
def test_a_set_that_could_not_be_loaded_leaves_the_file_as_it_was(
    tmp_path: Path, prompts: tuple[Prompt, ...], said: str
) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b"old")
    with pytest.raises(PromptError, match=re.escape(said)):
        save_prompts(PromptSet(prompts, "set"), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    prompts = parse(jsonl(record("a cat")))
    (tmp_path / "folder.jsonl").mkdir()
    for path, said in [
        (tmp_path / "set.csv", 'set.csv does not end in ".jsonl"'),
        (tmp_path / "nowhere" / "set.jsonl", "cannot be written: No such file or directory"),
        (tmp_path / "folder.jsonl", "cannot be written"),
        (tmp_path / "a\0b.jsonl", "cannot be written"),
    ]:
        with pytest.raises(PromptError, match=re.escape(said)):
            save_prompts(prompts, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.jsonl"]


def test_meta_cannot_shadow_a_field() -> None:
    with pytest.raises(PromptError, match='"split" is a field of its own'):
        Prompt("1", "a cat", "basic", "train", {"split": "test"})


def written(texts: list[str], kind: Kind) -> bytes:
    """A file of `texts` as a user's own program would write it."""
    if kind == "jsonl":
        return jsonl(*({"text": text} for text in texts))
    if kind == "txt":
        return "\n".join(texts).encode()
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["text"], *([text] for text in texts)])
    return table.getvalue().encode()


@settings(max_examples=60, deadline=None)
@given(texts=DISTINCT_TEXTS)
def test_any_distinct_texts_survive_every_format_and_mean_the_same_in_each(texts: list[str]) -> None:
    sets = [parse(written(texts, kind), kind) for kind in KINDS]
    for prompts in sets:
        assert [prompt.text for prompt in prompts.prompts] == texts
        assert len({prompt.id for prompt in prompts.prompts}) == len(texts)
        assert prompts.split("train")
    assert len({prompts.fingerprint() for prompts in sets}) == 1


@settings(max_examples=40, deadline=None)
@given(
    texts=DISTINCT_TEXTS,
    labels=st.lists(st.tuples(st.sampled_from(TIERS), st.sampled_from(SPLITS)), min_size=12, max_size=12),
    meta=st.dictionaries(st.sampled_from(["scene", "note", ""]), st.recursive(st.none() | TEXTS, st.lists)),
)
def test_any_labelled_set_survives_saving(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], labels: list[Any], meta: dict[str, Any]
) -> None:
    prompts = tuple(
        Prompt(f"id-{n}", text, tier, "train" if n == 0 else split, meta)
        for n, (text, (tier, split)) in enumerate(zip(texts, labels, strict=False))
    )
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    save_prompts(PromptSet(prompts, "any"), path)
    assert load_prompts(path).prompts == prompts


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.fixed_dictionaries({}, optional={key: JSON_VALUES for key in ("id", "text", "tier", "split", "x")})


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=200)
    | st.text('{}[]",:\n\r\t;ab\\u0d8\ufeff\u2028', max_size=60).map(str.encode)
    | st.lists(RECORDS | JSON_VALUES, max_size=4).map(lambda records: jsonl(*records)),
    kind=st.sampled_from(KINDS),
)
def test_any_bytes_give_a_sound_set_or_a_prompt_error(data: bytes, kind: Kind) -> None:
    try:
        prompts = parse(data, kind)
    except PromptError as error:
        assert error.problems
        assert all(f"set.{kind}" in problem for problem in error.problems)
        return
    assert prompts.split("train")
    assert len({prompt.id for prompt in prompts.prompts}) == len(prompts)
    assert len({normalize(prompt.text) for prompt in prompts.prompts}) == len(prompts)
    assert re.fullmatch(r"[0-9a-f]{64}", prompts.fingerprint())


# --- Which prompts are used when not all are ---------------------------------------------------------------

TIERED = st.lists(st.sampled_from(TIERS), max_size=40).map(
    lambda tiers: [Prompt(f"p{n}", f"a prompt {n}", tier, "test") for n, tier in enumerate(tiers)]
)


@settings(max_examples=200, deadline=None)
@given(TIERED, st.integers(1, 50))
def test_every_tier_has_its_share_of_the_prompts_that_are_used(prompts: list[Prompt], count: int) -> None:
    chosen = choose_prompts(prompts, count)
    assert len(chosen) == min(count, len(prompts))
    assert chosen == [prompt for prompt in prompts if prompt in chosen], "in the order given, none twice"
    for tier in TIERS:
        own, there = (sum(prompt.tier == tier for prompt in some) for some in (chosen, prompts))
        exact = there * min(1.0, count / max(1, len(prompts)))
        assert abs(own - exact) < 1


@settings(max_examples=100, deadline=None)
@given(TIERED, st.integers(1, 50), st.randoms(use_true_random=False))
def test_the_order_of_the_file_does_not_say_which_prompts_are_used(
    prompts: list[Prompt], count: int, order: random.Random
) -> None:
    shuffled = order.sample(prompts, len(prompts))
    assert {prompt.id for prompt in choose_prompts(shuffled, count)} == {
        prompt.id for prompt in choose_prompts(prompts, count)
    }


def test_places_that_do_not_divide_are_given_by_largest_remainder() -> None:
    tiers = ("complex",) * 5 + ("basic",) * 3 + ("challenging",) * 3
    prompts = [Prompt(f"p{n}", f"a prompt {n}", tier, "test") for n, tier in enumerate(tiers)]
    counted = [Counter(prompt.tier for prompt in choose_prompts(prompts, count)) for count in (1, 2, 4)]
    assert counted == [{"complex": 1}, {"complex": 1, "basic": 1}, {"complex": 2, "basic": 1, "challenging": 1}]


# --- The set for Stable Diffusion 3 that is shipped --------------------------------------------------------


@pytest.fixture(scope="module")
def general() -> PromptSet:
    return load_prompts(GENERAL)


def test_the_general_set_is_large_balanced_and_needs_no_assumption(general: PromptSet) -> None:
    assert general.report == ()
    least: dict[Split, int] = {"train": 165, "validation": 36, "test": 72}
    assert set(least) == set(get_args(Split))
    for split, number in least.items():
        tiers = general.counts()[split]
        assert sum(tiers.values()) >= number
        assert len(set(tiers.values())) == 1, "the same number of each tier"


def test_every_split_of_the_general_set_has_every_category(general: PromptSet) -> None:
    tier_of = {
        **dict.fromkeys(("animals", "landscapes"), "basic"),
        **dict.fromkeys(("colors", "materials", "counting", "spatial"), "challenging"),
        **dict.fromkeys(("crowds", "underwater", "ruins", "multi-subject", "juxtaposition"), "complex"),
    }
    for prompt in general.prompts:
        assert set(prompt.meta) == {"category"}
        assert tier_of[prompt.meta["category"]] == prompt.tier
    for split in SPLITS:
        least_common = Counter(prompt.meta["category"] for prompt in general.split(split))
        assert set(least_common) == set(tier_of)
        assert min(least_common.values()) >= 3


def test_the_general_prompts_are_short_enough_for_both_clip_encoders(general: PromptSet) -> None:
    # Both read 77 tokens. English has below two CLIP tokens a word, and a rewrite needs room to grow.
    assert max(len(prompt.text.split()) for prompt in general.prompts) <= 14
    assert min(len(prompt.text.split()) for prompt in general.prompts) >= 3


def test_the_general_prompts_ask_for_pictures_without_lettering(general: PromptSet) -> None:
    lettering = re.compile(
        r"\b(sign|signs|signboard|letters?|lettering|words?|text|caption|labels?|logos?|newspaper|magazine|"
        r"posters?|billboards?|menu|titled|says|saying|reads|graffiti|typewriter|clock)\b|[\"“”]"
    )
    assert [prompt.text for prompt in general.prompts if lettering.search(prompt.text.lower())] == []


def test_no_two_general_prompts_are_nearly_the_same(general: PromptSet) -> None:
    fillers = set(re.findall(r"\w+", "a an and at by from in of on over the through to under with"))
    words = [(prompt, set(normalize(prompt.text).split()) - fillers) for prompt in general.prompts]
    for (first, ours), (second, theirs) in itertools.combinations(words, 2):
        shared = len(ours & theirs) / len(ours | theirs)
        assert shared < 0.4, f"{first.id} {first.text!r} and {second.id} {second.text!r}"
