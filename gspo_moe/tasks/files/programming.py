"""Programming problems with their tests: LiveCodeBench's public files (arXiv 2403.07974) and open-r1/codeforces."""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping
from typing import Any

from gspo_moe.errors import DataError
from gspo_moe.plain_json import parse_json
from gspo_moe.tasks.files.columns import Columns, Record
from gspo_moe.tasks.files.formats import Parsed
from gspo_moe.tasks.files.pickled import pickled_text

LARGEST_TESTS = 1 << 30  # bytes of a problem's tests, unpacked
STDIN_TASK = (
    "Write a Python program that reads the input from stdin and writes the output to stdout. "
    "Put it into one ```python block."
)
FUNCTION_TASK = "Complete this Python code, and put all of it into one ```python block.\n\n```python\n{starter}\n```"


def is_livecodebench(record: Record) -> bool:
    return {"question_content", "public_test_cases"} <= set(record)


def is_codeforces(record: Record) -> bool:
    return {"description", "input_format", "output_format"} <= set(record)


def parse_livecodebench(record: Record, columns: Columns) -> Parsed:
    """Public and private tests, of a program or of a function. Raises DataError for a record without tests."""
    cases = [
        *_cases(record.get("public_test_cases"), "public_test_cases"),
        *_cases(record.get("private_test_cases"), "private_test_cases"),
    ]
    if not cases:
        raise DataError("it has no test cases")
    kinds = {str(case.get("testtype", "stdin")) for case in cases}
    if kinds not in ({"stdin"}, {"functional"}):
        raise DataError(f"its tests are of the types {', '.join(sorted(kinds))}; either stdin or functional can be run")
    tests: dict[str, Any] = {
        "kind": "stdin",
        "inputs": [_text(case, "input") for case in cases],
        "outputs": [_text(case, "output") for case in cases],
    }
    starter = record.get("starter_code") or ""
    if kinds == {"functional"}:
        name = _object(record.get("metadata"), "metadata").get("func_name")
        if not isinstance(name, str) or not name:
            raise DataError("its tests call a function and its metadata has no func_name")
        tests |= {"kind": "function", "function": name}
    asked = FUNCTION_TASK.format(starter=starter.rstrip()) if starter.strip() else STDIN_TASK
    used = {"question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata"}
    return Parsed(text=f"{_text(record, 'question_content')}\n\n{asked}", tests=tests, used=frozenset(used))


def parse_codeforces(record: Record, columns: Columns) -> Parsed:
    """Examples and official tests of a program. Raises DataError for problems that no such test can decide."""
    if record.get("interaction_format") or record.get("input_mode") not in (None, "stdio"):
        raise DataError("it is interactive or reads a file, and only programs on stdin and stdout can be tested")
    if record.get("generated_checker"):
        raise DataError("its generated_checker says which of several outputs are right, and no checker is run")
    cases = {
        (_text(case, "input"), _text(case, "output")): None
        for column in ("examples", "official_tests")
        for case in record.get(column) or ()
    }
    if not cases:
        raise DataError("it has neither official_tests nor examples")
    tests: dict[str, Any] = {
        "kind": "stdin",
        "inputs": [given for given, _ in cases],
        "outputs": [wanted for _, wanted in cases],
    }
    if record.get("time_limit") is not None:
        tests["time_limit_seconds"] = float(record["time_limit"])
    used = {*_SECTIONS, "title", "examples", "official_tests", "time_limit", "generated_checker"}
    return Parsed(text=_statement(record), tests=tests, used=frozenset(used))


_SECTIONS = {"description": "", "input_format": "Input", "output_format": "Output", "note": "Note"}


def _statement(record: Record) -> str:
    parts = [f"# {record['title']}"] if record.get("title") else []
    for column, heading in _SECTIONS.items():
        if record.get(column):
            parts.append((f"## {heading}\n" if heading else "") + str(record[column]).strip())
    limits = [
        f"{word} limit: {record[column]:g} {unit}"
        for column, word, unit in (("time_limit", "Time", "seconds"), ("memory_limit", "Memory", "megabytes"))
        if isinstance(record.get(column), int | float)
    ]
    shown = [
        f"## Example\nInput:\n```\n{_text(case, 'input').rstrip()}\n```\nOutput:\n```\n"
        f"{_text(case, 'output').rstrip()}\n```"
        for case in record.get("examples") or ()
    ]
    return "\n\n".join([*parts, *shown, *(["\n".join(limits)] if limits else []), STDIN_TASK])


def _cases(value: Any, column: str) -> list[Mapping[str, Any]]:
    """A list of cases, the JSON of one, or what the public release packs it into: pickle, zlib and base64."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        value = _unpacked(value, column) if value.lstrip()[:1] != "[" else value
        try:
            value = parse_json(value)
        except ValueError as error:
            raise DataError(f"its {column} is no JSON ({error})") from None
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise DataError(f"its {column} is no list of tests")
    return value


def _unpacked(value: str, column: str) -> str:
    try:
        unzip = zlib.decompressobj()
        content = unzip.decompress(base64.b64decode(value, validate=True), LARGEST_TESTS)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise DataError(f"its {column} is neither JSON nor packed as LiveCodeBench packs it ({error})") from None
    if unzip.unconsumed_tail or not unzip.eof:
        raise DataError(f"its {column} is cut off, or unpacks to more than {LARGEST_TESTS >> 20} MiB")
    return pickled_text(content)


def _object(value: Any, column: str) -> Mapping[str, Any]:
    try:
        found = parse_json(value) if isinstance(value, str) else value or {}
    except ValueError as error:
        raise DataError(f"its {column} is no JSON ({error})") from None
    if not isinstance(found, Mapping):
        raise DataError(f"its {column} is no object")
    return found


def _text(values: Mapping[str, Any], key: str) -> str:
    if not isinstance(values.get(key), str):
        raise DataError(f"its {key} is {'null' if values.get(key) is None else 'not text'}")
    return str(values[key])
