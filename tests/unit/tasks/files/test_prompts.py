"""`task.data` from config to prompts: columns, formats, splits, bad records."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gspo_moe.config.task import FROM_FILES, TaskConfig
from gspo_moe.config.validation import validated
from gspo_moe.data.prompts import PromptPosition, PromptSource
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.tasks import make_task
from gspo_moe.tasks.files import FilePrompts
from gspo_moe.tasks.protocol import Task
from gspo_moe.types import Message, Prompt

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "7 + 7?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "14"},
    "extra_info": {"index": 3},
}


def write(file: Path, *records: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return file


def task(folder: Path, *records: Any, **data: Any) -> Task:
    """Of one file with these records."""
    return made(train=str(write(folder / "mine.jsonl", *records)), **data)


def made(seed: int = 1, **data: Any) -> Task:
    config = validated(TaskConfig, {"data": data})
    assert config.name == FROM_FILES
    return make_task(config, seed)


def first(folder: Path, record: Any, **data: Any) -> Prompt:
    return task(folder, record, **data).prompts.prompt("train", 0)


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def test_rows_of_verl_work_as_they_are(tmp_path: Path) -> None:
    assert first(tmp_path, VERL) == Prompt(
        uid="train/mine/1",
        text="",
        task="data",
        reference={
            "answer": "14",
            "row": {"ability": "math", "reward_model": VERL["reward_model"], "extra_info": {"index": 3}},
            "source": "openai/gsm8k",
        },
        messages=user("7 + 7?"),
    )


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARED = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("record", "text", "messages", "answer", "demonstration"),
    [
        ({"question": "q", "answer": "7 + 7 = 1014\n#### 1,014"}, "q", (), "1014", "7 + 7 = 1014\n#### 1,014"),
        ({"prompt": "q", "answer": 14}, "q", (), 14, "14"),
        ({"Problem": "q", "Solution": "so", "Answer": 33, "ID": "2024-II-4"}, "q", (), 33, "so"),
        ({"id": 60, "problem": "q", "solution": "so", "answer": "033"}, "q", (), "033", "so"),
        ({"problem": "q", "solution": "so"}, "q", (), "so", "so"),
        ({"instruction": "q", "input": "x", "output": "a"}, "q\nx", (), None, "a"),
        ({"instruction": "q", "input": "", "output": "a"}, "q", (), None, "a"),
        ({"messages": CHAT, "label": [1]}, "", user("q"), [1], (Message("assistant", "a"),)),
        ({"messages": CHAT[:1], "answer": "a"}, "", user("q"), "a", "a"),
        ({"conversations": SHARED}, "", (Message("system", "s"), *user("q")), None, (Message("assistant", "a"),)),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "", user("q"), None, (Message("assistant", "a"),)),
        ({"query": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}, "", user("q"), None, None),
        ({"prompt": "q", "system": "s"}, "", (Message("system", "s"), *user("q")), None, None),
    ],
)
def test_columns_are_found_by_the_names_of_public_data(
    record: Any, text: str, messages: Any, answer: Any, demonstration: Any, tmp_path: Path
) -> None:
    found = task(tmp_path, record)
    prompt = found.prompts.prompt("sft", 0)
    assert (prompt.text, prompt.messages, prompt.reference.get("answer")) == (text, messages, answer)
    if demonstration is None:
        with pytest.raises(ConfigError, match=r"mine.jsonl, line 1 has no demonstration .*task\.data\.columns\.demon"):
            found.demonstration(prompt)
    else:
        assert found.demonstration(prompt) == demonstration


def test_columns_of_the_config_by_dotted_path(tmp_path: Path) -> None:
    record = {"in": {"text": "q", "a.b": "dot"}, "out": [{"gold": "a"}], "name": "n7", "prompt": "other", "n": 1}
    columns = {"prompt": "in.text", "answer": "out.0.gold", "uid": "name", "demonstration": "in.a.b", "system": "n"}
    with pytest.raises(DataError, match="line 1: its system message is not text"):
        first(tmp_path, record, columns=columns)
    del columns["system"]
    found = task(tmp_path, record, columns=columns)
    prompt = found.prompts.prompt("train", 0)
    assert (prompt.uid, prompt.text, prompt.reference["answer"]) == ("train/n7", "q", "a")
    assert found.demonstration(prompt) == "dot"
    own = made(train=[{"path": str(tmp_path / "mine.jsonl"), "columns": {"prompt": "prompt"}}], columns=columns)
    assert own.prompts.prompt("train", 0).text == "other"


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def test_tools_rewards_and_other_columns_go_along(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": "q", "tools": json.dumps([TOOL]), "level": 3})
    prompt = made(train=[{"path": str(file), "reward": "exact"}]).prompts.prompt("train", 0)
    assert prompt.tools == (TOOL,)
    assert prompt.reference == {"row": {"level": 3}, "source": "a", "reward": "exact"}


@pytest.mark.parametrize(
    ("record", "data", "messages", "text"),
    [
        ({"a": "x", "b": {"c": 3}}, {"template": "{a} {b.c} \\boxed{{}} {}"}, (), "x 3 \\boxed{} {}"),
        ({"question": "q"}, {"template": "{prompt}!", "system": "s"}, (Message("system", "s"), *user("q!")), ""),
        ({"messages": CHAT[:1]}, {"template": "{prompt}!"}, user("q!"), ""),
        ({"messages": SHARED[:2]}, {"system": "other"}, (Message("system", "s"), *user("q")), ""),
    ],
)
def test_templates_and_system_messages(record: Any, data: Any, messages: Any, text: str, tmp_path: Path) -> None:
    prompt = first(tmp_path, record, **data)
    assert (prompt.messages, prompt.text) == (messages, text)


@pytest.mark.parametrize("record", [{"Problem": "q", "Answer": 33}, {"problem": "q", "answer": "033"}, VERL])
def test_answers_of_aime_are_integers(record: Any, tmp_path: Path) -> None:
    aime = {"path": str(write(tmp_path / "aime.jsonl", record)), "format": "aime"}
    prompt = made(eval=[aime]).prompts.prompt("eval", 0)
    assert prompt.reference["answer"] == ("14" if record is VERL else "33")
    write(tmp_path / "aime.jsonl", {"problem": "q", "answer": "x"})
    wrong = made(eval=[aime]).prompts
    with pytest.raises(DataError, match=r"aime\.jsonl, line 1: its answer 'x' is no integer from 0 to 999"):
        wrong.size("eval")


PLAIN = {"prompt": "q", "answer": "a"}
BAD: list[tuple[Any, str]] = [
    ('{"prompt": ', "it is no JSON"),
    ({"prompt": None}, "its prompt is missing or null"),
    ({"other": "q"}, "its prompt is missing or null"),
    ({"prompt": " \n"}, "its prompt is empty"),
    ({"prompt": 3}, "its prompt is 3, not text"),
    ({"prompt": {"text": "q"}}, "not text"),
    ({"prompt": []}, r"its prompt is \[\], not a list of messages"),
    ({"prompt": ["q"]}, "not a message with role and content"),
    ({"prompt": [{"role": "robot", "content": "q"}]}, "role 'robot'; give one of system"),
    ({"prompt": [{"role": "user", "content": None}]}, r"its prompt\[0\]\.content is missing or null"),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "type 'image'; only text"),
    ({"prompt": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "has tool_calls, which is not read"),
    ('{"prompt": "q", "more": ' + "[" * 800 + "]" * 800 + "}", "more than 100 deep"),
    ({"prompt": "q", "tools": "{"}, "its tools is text that is no JSON"),
]


@pytest.mark.parametrize(("record", "fault"), BAD, ids=[fault for _, fault in BAD])
def test_a_bad_record_is_named_by_file_and_line_or_left_out(record: Any, fault: str, tmp_path: Path) -> None:
    start = {**PLAIN, "tools": None}
    with pytest.raises(
        DataError, match=rf"mine\.jsonl, line 2: .*{fault}.*; mend it, or set task\.data\.on_bad_record"
    ):
        task(tmp_path, start, record).prompts.size("train")
    prompts = task(tmp_path, start, record, PLAIN, on_bad_record="skip").prompts
    assert isinstance(prompts, FilePrompts)
    assert prompts.size("train") == 2
    assert [prompts.where("train", index).rpartition(" ")[2] for index in (0, 1)] == ["1", "3"]
    (said,) = prompts.skipped("train")
    assert "mine.jsonl, line 2: " in said
    assert prompts.prompt("train", 1).uid == "train/mine/3"


@pytest.mark.parametrize(
    ("records", "data", "fault"),
    [
        ([{"a": "q", "b": 1}], {}, r"line 1 has no column that is known as a prompt; it has a, b: .*columns\.prompt="),
        (
            [PLAIN],
            {"columns": {"answer": "gold.x"}},
            r"columns\.answer=gold\.x is no column of .*; it has prompt, answer",
        ),
        ([{"question": "q", "query": "r"}], {}, r"several columns that may be the prompt \(question, query\) among"),
        ([{"prompt": "q", "messages": CHAT}], {}, r"has both messages and prompt .*columns\.messages=messages or"),
        ([{**PLAIN, "label": 1}], {}, r"may be the answer \(answer, label\)"),
        ([PLAIN], {"held_out": 1}, "held_out=1 leaves none of the 1 different prompts"),
        ([{"a": 1}], {"template": "{b}"}, r"template has \{b\} and the record no text or number there.*\{\{b\}\}"),
        ([{**PLAIN, "uid": 7}, {**PLAIN, "uid": "7"}], {}, "line 2 has the uid 7, as .*line 1 has"),
        (["x"], {"on_bad_record": "skip"}, r"task\.data\.train: no record can be read, the first is .*line 1"),
        ([""], {}, "is empty"),
    ],
)
def test_files_that_cannot_be_read_say_what_to_do(records: Any, data: Any, fault: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=fault) as caught:
        task(tmp_path, *records, **data).prompts.size("train")
    assert "\n" not in str(caught.value)


def test_a_format_is_held_to(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", PLAIN)
    for form, fault in (
        ("gsm8k", "no line `#### NUMBER`"),
        ("livecodebench", "null|no test"),
        ("codeforces", "neither"),
    ):
        with pytest.raises(DataError, match=fault):
            made(train=[{"path": str(file), "format": form}]).prompts.size("train")
    write(file, {"prompt": "q"})
    with pytest.raises(ConfigError, match=r"no reward_model\.ground_truth"):
        made(train=[{"path": str(file), "format": "verl"}]).prompts.size("train")


def test_an_unclear_demonstration_is_only_told_to_who_wants_one(tmp_path: Path) -> None:
    found = task(tmp_path, {"prompt": "q", "response": "a", "output": "b"})
    with pytest.raises(ConfigError, match=r"several columns that may be the demonstration \(response, output\)"):
        found.demonstration(found.prompts.prompt("train", 0))


def numbered(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"q{number}", **more} for number in range(count)]


def test_held_out_prompts_are_never_trained_on_also_where_they_stand_twice(tmp_path: Path) -> None:
    prompts = task(tmp_path, *numbered(6), *numbered(4), held_out=3).prompts
    texts = {
        split: [prompts.prompt(split, i).text for i in range(prompts.size(split) or 0)]
        for split in ("eval", "train", "sft")
    }
    assert len(texts["eval"]) == len(set(texts["eval"])) == 3
    assert set(texts["eval"]) | set(texts["train"]) == {f"q{number}" for number in range(6)}
    assert not set(texts["eval"]) & set(texts["train"])
    assert texts["sft"] == texts["train"]
    others = made(seed=2, train=str(tmp_path / "mine.jsonl"), held_out=3).prompts
    assert [others.prompt("eval", index).text for index in range(3)] != texts["eval"]


def test_files_of_one_name_limits_and_splits(tmp_path: Path) -> None:
    files = [write(tmp_path / folder / "x.jsonl", *numbered(4)) for folder in ("a", "b")]
    found = made(train=[{"path": str(file), "limit": 2} for file in files], sft=str(files[0])).prompts
    assert [found.prompt("train", index).uid for index in range(4)] == [
        "train/x/1",
        "train/x/2",
        "train/x~2/1",
        "train/x~2/2",
    ]
    assert [found.size(split) for split in ("train", "sft", "eval")] == [4, 4, 0]
    with pytest.raises(ConfigError, match="4 prompts in its split 'train', and none of number 4"):
        found.prompt("train", 4)
    folder = made(train=[{"path": str(tmp_path), "limit": 5}]).prompts
    assert folder.size("train") == 5


def test_a_source_goes_on_at_the_exact_prompt_and_pairs_uids_with_epochs(tmp_path: Path) -> None:
    files = [str(write(tmp_path / f"{name}.jsonl", *numbered(size, name=name))) for name, size in (("a", 3), ("b", 5))]

    def source(position: PromptPosition | None = None, **data: Any) -> PromptSource:
        return PromptSource(made(**data).prompts, "train", position or PromptPosition())

    mixed: dict[str, Any] = {"train": [{"path": files[0], "weight": 3}, {"path": files[1], "weight": 1}]}
    cases: tuple[dict[str, Any], ...] = ({"train": files}, mixed)
    for data in cases:
        whole = source(**data)
        taken = [prompt for _ in range(10) for prompt in whole.take(3)]
        assert len({prompt.uid for prompt in taken}) == 30
        whole.done(taken[:11] + taken[12:])
        again = source(whole.position, **data)
        assert again.take(1) == [taken[11]]
        assert again.take(5) == whole.take(5)
    assert [prompt.uid for prompt in source(train=files, shuffle=False).take(9)][7:] == [
        "train/b/5",
        "train/a/1/epoch2",
    ]
    prompts = made(**mixed)
    repeated = next(
        prompt for prompt in PromptSource(prompts.prompts, "train").take(9) if prompt.uid.endswith("epoch2")
    )
    with pytest.raises(ConfigError, match="has no demonstration"):
        prompts.demonstration(repeated)
    of_a = [prompt.reference["row"]["name"] == "a" for prompt in source(**mixed).take(40)]
    assert sum(of_a) == 30


def test_what_is_left_keeps_an_order_of_its_own(tmp_path: Path) -> None:
    prompts = task(tmp_path, *numbered(6)).prompts
    assert isinstance(prompts, FilePrompts)
    kept = prompts.kept("train", [1, 3, 5])
    assert (kept.size("train"), prompts.size("train")) == (3, 6)
    assert {prompt.text for prompt in PromptSource(kept, "train").take(3)} == {"q1", "q3", "q5"}


def test_a_reward_worker_reads_no_file_and_loads_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from gspo_moe.config.task import TaskConfig; from gspo_moe.tasks import make_task\n"
        "task = make_task(TaskConfig.model_validate({'data': {'train': 'gone.jsonl'}}), 1)\n"
        "assert not {'torch', 'pyarrow', 'datasets'} & set(sys.modules)\n"
        "try: task.prompts.size('train')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "task.data.train=gone.jsonl does not exist" in done.stdout
