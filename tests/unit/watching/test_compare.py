"""`gspo-moe compare`: what it prints and writes of two folders, and that streaming changes nothing."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3_5MoeConfig

import gspo_moe
from gspo_moe.cli import main
from gspo_moe.errors import ConfigError, DataError
from gspo_moe.watching import checkpoints, compare
from gspo_moe.watching.checkpoints import choose_source, compare_sources, snapshots
from gspo_moe.watching.texts import Row, batches, read_rows
from tests.families import tiny

ROWS = [Row((5, 9, 11, 4, 30, 7, 22), 2), Row((8, 3, 44)), Row((60, 59, 58, 57, 56), 3), Row((12, 12, 13, 14, 15, 16))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small Qwen3 MoE of three layers, one of them dense, and the same one a step further."""
    root = tmp_path_factory.mktemp("models")
    model = tiny("Qwen3Moe", num_hidden_layers=3, mlp_only_layers=[1])
    model.save_pretrained(root / "a")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    model.save_pretrained(root / "b", save_original_format=False)
    return root / "a", root / "b"


def test_layer_by_layer_is_the_whole_model(folders: tuple[Path, Path]) -> None:
    found = batches(ROWS, 14)
    assert [len(batch.input_ids) for batch in found] == [2, 2]
    whole, streamed = ([choose_source(folder, None, "cpu", way) for folder in folders] for way in (False, True))
    for one, other in zip(whole, streamed, strict=True):
        held = snapshots(whole[0], found, None)[0]
        for expected, got in zip(snapshots(one, found, held), snapshots(other, found, held), strict=True):
            assert expected is not None
            assert got is not None
            assert got.layers == expected.layers == ("model.layers.0.mlp.gate", "model.layers.2.mlp.gate")
            assert torch.equal(got.routes_MLK, expected.routes_MLK)
            for name in ("log_scores_MLE", "margin_ML"):
                torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-5, rtol=0)
            counted = expected.masks.targets_T
            assert expected.log_probs_T is not None
            assert got.log_probs_T is not None
            torch.testing.assert_close(got.log_probs_T[counted], expected.log_probs_T[counted], atol=1e-5, rtol=0)
    figures, _ = compare_sources(streamed[0], streamed[1], found)
    assert 0 < figures.to_metrics()["slot_change"] < 1  # type: ignore[operator]


class Alive(TorchDispatchMode):
    """The most bytes of the CPU's that tensors made under it held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.bytes += size
            self.most = max(self.most, self.bytes)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.bytes -= size


@pytest.mark.parametrize("one_by_one", [True, False])
def test_streaming_holds_one_layer_of_however_many(one_by_one: bool, tmp_path: Path) -> None:
    most, layer = [], 0
    for layers in (2, 6):
        model = tiny("Qwen3Moe", num_hidden_layers=layers, num_experts=16, hidden_size=64).bfloat16()
        layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters()) * 4
        model.save_pretrained(tmp_path / str(layers), save_original_format=one_by_one)
        source = choose_source(tmp_path / str(layers), "float32", "cpu", True)  # so that every tensor is a copy
        with Alive() as alive:
            snapshots(source, batches(ROWS, 100), None)
        most.append(alive.most)
    assert layer < most[0] < 1.5 * layer
    assert most[1] - most[0] < 0.1 * layer


def test_a_whole_model_is_gone_before_the_next_one_comes(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[weakref.ref[torch.nn.Module]] = []

    def watched(model: torch.nn.Module) -> gspo_moe.Watcher:
        assert not any(one() for one in came)
        came.append(weakref.ref(model))
        return gspo_moe.watch(model)

    monkeypatch.setattr(checkpoints, "watch", watched)
    old, new = (choose_source(folder, None, "cpu", False) for folder in folders)
    compare_sources(old, new, batches(ROWS, 100))
    assert len(came) == 2


def test_the_command_says_what_the_library_finds(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, page, written = tmp_path / "<prompts>.jsonl", tmp_path / "page.html", tmp_path / "figures.json"
    data.write_text("".join(json.dumps({"token_ids": row.token_ids}) + "\n" for row in ROWS))
    old, new = map(str, folders)
    assert main(["compare", old, new, "--data", str(data), "--output", str(page), "--json", str(written)]) == 0
    models = [checkpoints_model(folder) for folder in folders]
    batch = batches([Row(row.token_ids) for row in ROWS], 1000)[0]
    before = gspo_moe.watch(models[0]).snapshot(batch.input_ids, batch.attention_mask)
    watcher = gspo_moe.watch(models[1])
    after = watcher.snapshot(batch.input_ids, batch.attention_mask)
    held = watcher.snapshot(batch.input_ids, batch.attention_mask, routes=before.routes_TLK)
    expected = compare(before, after, held).to_metrics()
    figures = json.loads(written.read_text())
    for name in ("slot_change", "any_layer_flip", "router_shift", "phi_token", "washout", "k3", "slot_change_by_layer"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-4), name
    shown = capsys.readouterr().out
    assert f"{100 * figures['slot_change']:.4g}" in shown
    html = page.read_text()
    assert f"{100 * figures['slot_change']:.4g}" in html
    assert "&lt;prompts&gt;.jsonl" in html
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")


def checkpoints_model(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder)
    return model


def test_a_model_against_itself_in_another_precision_moves(folders: tuple[Path, Path]) -> None:
    found = batches(ROWS, 100)
    exact, rounded = (choose_source(folders[0], dtype, "cpu", False) for dtype in (None, "bfloat16"))
    assert compare_sources(exact, exact, found)[0].to_metrics()["log_prob_change_max"] == 0
    change = compare_sources(exact, rounded, found)[0].to_metrics()["log_prob_change_abs"]
    assert 1e-4 < change < 0.5  # type: ignore[operator]


def test_what_does_not_fit_is_streamed_or_refused(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "free_memory", lambda device: 1000)
    assert choose_source(folders[0], None, "cpu", False).streamed
    tiny("Mixtral").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="only qwen3_moe runs layer by layer, not mixtral"):
        choose_source(tmp_path, None, "cpu", False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"text": 3}', "line 1: the first model's folder has no tokenizer"),
        ('{"token_ids": [3, 61]}', r"must lie in \[0, 61\)"),
        ('{"token_ids": [3]}', "fewer than two tokens"),
        ("[1]", "line 1: not of the form"),
        ("", "is empty"),
    ],
)
def test_lines_that_cannot_be_measured_are_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(line)
    with pytest.raises(DataError, match=message):
        read_rows(file, None, 61, 100)


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"token_ids": [3, 4], "of": "a\u2028b\x85c"}\r\n{"token_ids": [5, 6]}\n', newline="")
    assert read_rows(file, None, 61, 100) == [Row((3, 4)), Row((5, 6))]


def test_files_that_transformers_does_not_read_are_not_streamed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[0], tmp_path / "a")
    shutil.copy(folders[1] / "model.safetensors", folder / "older.safetensors")
    expected, found = (
        snapshots(choose_source(one, None, "cpu", True), batches(ROWS, 100), None)[0] for one in (folders[0], folder)
    )
    assert found.log_probs_T is not None
    assert expected.log_probs_T is not None
    assert torch.equal(found.log_probs_T, expected.log_probs_T)


def test_what_a_checkpoint_lacks_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[0], tmp_path / "a")
    single = folder / "model.safetensors"
    tensors = load_file(single)

    def streamed(without: str) -> None:
        save_file({name: tensor for name, tensor in tensors.items() if name != without}, single)
        snapshots(choose_source(folder, None, "cpu", True), batches(ROWS, 100), None)

    for name in ("model.layers.0.mlp.experts.3.up_proj.weight", "model.layers.1.input_layernorm.weight"):
        with pytest.raises(DataError, match=f"lacks .*{name.removeprefix('model.layers.')[2:]}; give a whole"):
            streamed(name)
    with pytest.raises(DataError, match=r"has no tensor lm_head\.weight"):  # whose config ties nothing
        streamed("lm_head.weight")
    for name in ("mlp.experts.3.up_proj.weight", "self_attn.q_norm.weight"):
        whole = tensors[f"model.layers.0.{name}"]
        tensors[f"model.layers.0.{name}"] = whole[:1].clone()
        with pytest.raises(DataError, match=r"layer 0.* is not its config's"):
            streamed("")
        tensors[f"model.layers.0.{name}"] = whole
    tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.0.mlp.gate.weight"] * torch.nan
    with pytest.raises(DataError, match="look for NaN"):
        streamed("")
    single.unlink()
    with pytest.raises(DataError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        choose_source(folder, None, "cpu", False)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(
        DataError, match=r"00002\.safetensors is not there, which model\.safetensors\.index\.json names"
    ):
        choose_source(folder, None, "cpu", False)


def test_a_config_of_text_and_images_is_read_by_its_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for width, folder in zip((32, 64), folders, strict=True):
        Qwen3_5MoeConfig(text_config={"hidden_size": width}).save_pretrained(folder)
    assert main(["compare", *map(str, folders), "--data", "none.jsonl"]) == 2
    assert "compare one architecture" in capsys.readouterr().err


def test_a_response_counts_alone_and_texts_are_cut() -> None:
    class Words:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + [len(word) for word in text.split()]}

        def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool, **_: bool) -> str:
            return " ".join(f"{one['role']} {one['content']}" for one in messages) + " " * (len(messages) == 1)

    def row(values: object, tmp: Path = Path("/tmp")) -> Row:
        from gspo_moe.watching.texts import _row

        return _row(json.dumps(values), Words(), "line 1")

    assert row({"text": "a bb"}) == Row((1, 1, 2))
    assert row({"prompt": "a bb", "response": "ccc dd"}) == Row((1, 1, 2, 3, 2), 3)
    said = [{"role": "user", "content": "aa"}, {"role": "it", "content": "bbb"}]
    assert row({"messages": said}) == Row((4, 2, 2, 3), 2)
