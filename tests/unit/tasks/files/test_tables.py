"""Files of records against what wrote them."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gspo_moe import packages
from gspo_moe.config.data import DataFile
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.tasks.files.folders import files_of
from gspo_moe.tasks.files.tables import open_table

ROWS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": "ä\u2028b"}], "reward_model": {"ground_truth": "1"}, "n": 1},
    {"prompt": [{"role": "user", "content": "c"}], "reward_model": {"ground_truth": "2"}, "n": 2},
    {"prompt": [{"role": "user", "content": "d"}], "reward_model": {"ground_truth": "3"}, "n": None},
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        kind = pa.ipc.new_file if path.stem == "file" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, kind(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "stream.arrow", "file.arrow"])
def test_rows_are_those_that_were_written_in_any_order(name: str, tmp_path: Path) -> None:
    table = open_table(write(tmp_path / name))
    assert [table.row(number) for number in (2, 0, 1)] == [ROWS[2], ROWS[0], ROWS[1]]
    assert len(table) == 3


def test_lines_are_told_by_newlines_alone_and_empty_ones_count_where_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": "x\xe2\x80\xa8y"}\r\n\n  \n{"a": 2}')
    table = open_table(file)
    assert [table.row(0), table.row(1)] == [{"a": "x\u2028y"}, {"a": 2}]
    assert [table.place(0), table.place(1)] == [f"{file}, line 1", f"{file}, line 4"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"a": ', "no JSON"),
        (b'{"a": "\xff"}', "not UTF-8 text .*byte 7"),
        (b"[1]", "it is a list, not an object"),
        (b"null", "it is null"),
        (b'"a"', "it is text"),
        (b"1.5", "it is a number"),
        (b"[" * 100_000, "no JSON"),
        (b"9" * 5_000, "no JSON"),
        (rb'{"a": ["\ud83d"]}', r"half of a character \('.ud83d'"),
    ],
)
def test_a_line_that_is_no_record_is_refused(line: bytes, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n' + line)
    with pytest.raises(DataError, match=fault):
        open_table(file).row(1)


def test_pairs_of_surrogates_are_characters_and_halves_of_one_are_none(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(rb'[{"a": "\ud83d\ude00"}, {"\uDE00": 1}]')
    table = open_table(file)
    assert table.row(0) == {"a": "\N{GRINNING FACE}"}
    with pytest.raises(DataError, match="half of a character"):
        table.row(1)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.jsonl", b"", r"a\.jsonl is empty; give a file with at least one record"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.json", b"[]", "is empty"),
        ("a.json", b"[1", "no JSON.*or write one record a line"),
        ("a.parquet", b"PAR1", r"no readable \.parquet file"),
        ("a.arrow", b"x", r"no readable \.arrow file"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_a_file_without_records_is_refused(name: str, content: bytes, fault: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=fault):
        open_table(tmp_path / name)


def test_lines_are_read_without_pyarrow_and_parquet_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        assert not name.startswith("pyarrow")
        return real(name, *args, **options)

    lines, parquet = write(tmp_path / "a.jsonl"), write(tmp_path / "a.parquet")
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(packages, "_is_there", lambda module: module != "pyarrow")
    assert open_table(lines).row(1) == ROWS[1]
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        open_table(parquet)


def saved(folder: Path) -> None:
    """As `Dataset.save_to_disk` writes one, in two shards whose order is the state's."""
    write(folder / "data-00000-of-00002.arrow", ROWS[:1])
    write(folder / "data-00001-of-00002.arrow", ROWS[1:])
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for split in ("train", "test"):
        saved(root / "saved" / split)
    (root / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write(root / "hub" / "data" / f"{name}.parquet")
    (root / "hub" / "README.md").write_text("---\nlicense: mit\n---\n")
    write(root / "hub" / ".cache" / "train.jsonl")
    write(root / "lcb" / "test.jsonl")
    write(root / "lcb" / "test5.jsonl")
    write(root / "plain" / "b.jsonl")
    write(root / "plain" / "a.jsonl")
    write(root / "both" / "test.jsonl")
    write(root / "both" / "validation" / "0.parquet")
    write(root / "constrained" / "constrained.jsonl")
    (root / "none").mkdir()
    (root / "a.csv").write_text("a,b\n")
    return root


@pytest.mark.parametrize(
    ("path", "split", "of", "names"),
    [
        ("saved", "train", None, ["train/data-00000-of-00002.arrow", "train/data-00001-of-00002.arrow"]),
        ("saved", "eval", None, ["test/data-00000-of-00002.arrow", "test/data-00001-of-00002.arrow"]),
        ("saved", "eval", "train", ["train/data-00000-of-00002.arrow", "train/data-00001-of-00002.arrow"]),
        ("saved/train", "eval", None, ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]),
        ("hub", "sft", None, ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
        ("hub", "eval", None, ["data/test-00000-of-00001.parquet"]),
        ("lcb", "eval", None, ["test.jsonl", "test5.jsonl"]),
        ("plain", "train", None, ["a.jsonl", "b.jsonl"]),
        ("plain", "eval", None, ["a.jsonl", "b.jsonl"]),
        ("both", "eval", "validation", ["validation/0.parquet"]),
        ("constrained", "train", None, ["constrained.jsonl"]),
    ],
)
def test_folders_of_data_sets(path: str, split: str, of: str | None, names: list[str], folders: Path) -> None:
    found = files_of(DataFile(path=str(folders / path), split=of), split, f"task.data.{split}")
    assert found == [folders / path / name for name in names]


@pytest.mark.parametrize(
    ("path", "split", "of", "fault"),
    [
        ("lcb", "train", None, "has no split 'train'; it has test: set task.data.train to {path: .*, split: NAME}"),
        ("both", "eval", None, "more than one split that would do; it has test, validation"),
        ("hub", "eval", "dev", "has no split 'dev'; it has test, train"),
        ("saved/train", "train", "train", "is one split of a data set; leave split=train out"),
        ("plain/a.jsonl", "train", "train", "split=train is of folders"),
        ("none", "train", None, r"folder without \.jsonl, "),
        ("gone", "train", None, r"task\.data\.train=.*gone does not exist; give a file"),
        ("a.csv", "train", None, r"none of \.jsonl, .*convert it"),
    ],
)
def test_paths_without_the_split_are_refused(path: str, split: str, of: str | None, fault: str, folders: Path) -> None:
    with pytest.raises(ConfigError, match=fault):
        files_of(DataFile(path=str(folders / path), split=of), split, f"task.data.{split}")
