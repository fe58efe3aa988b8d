"""Nothing that reads a file runs what the file says, read from the syntax tree of every module."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "gspo_moe"
MODULES = sorted(PACKAGE.rglob("*.py"))
# What may run code unless one of these arguments says otherwise; None where none does.
READERS: dict[str, tuple[str, str] | None] = {
    "torch.load": ("weights_only", "True"),
    "np.load": ("allow_pickle", "False"),
    "numpy.load": ("allow_pickle", "False"),
    "yaml.load": ("Loader", "_Loader"),  # config/loading.py, a SafeLoader
    **dict.fromkeys(("pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.unsafe_load", "yaml.full_load")),
    **dict.fromkeys(("marshal.load", "marshal.loads", "shelve.open", "joblib.load", "runpy.run_path")),
    **dict.fromkeys(("torch.jit.load", "torch.package.PackageImporter", "pandas.read_pickle", "pd.read_pickle")),
    **dict.fromkeys(("dist_checkpointing.load", "dist_checkpointing.load_common_state_dict")),
    **dict.fromkeys(("dist_checkpointing.load_tensors_metadata", "dist_checkpointing.load_plain_tensors")),
    **dict.fromkeys(("FileSystemReader", "eval", "exec", "AutoModel.from_pretrained", "AutoTokenizer.from_pretrained")),
}
MAY = {
    ("model/reading.py", "dist_checkpointing.load"),  # under its guard
    ("model/reading.py", "dist_checkpointing.load_common_state_dict"),
    ("model/reading.py", "dist_checkpointing.load_tensors_metadata"),
    ("watching/checkpoints.py", "AutoTokenizer.from_pretrained"),  # which is told to run none
    ("tasks/worker.py", "pickle.loads"),  # a config and work, from a process to its own workers
    ("tasks/worker.py", "pickle.load"),
    ("tasks/sandbox/inside.py", "exec"),  # what runs in the sandbox
    ("tasks/sandbox/inside.py", "eval"),
    ("tasks/sandbox/remote.py", "exec"),
}


def faults(source: str, module: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if not isinstance(node, ast.Call) or name not in READERS or (module, name) in MAY:
            continue
        wanted = READERS[name]
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if wanted is None or given.get(wanted[0]) != wanted[1]:
            found.append(f"{module}:{node.lineno} {name}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_read_in_a_way_that_runs_code(path: Path) -> None:
    assert faults(path.read_text(), str(path.relative_to(PACKAGE))) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import torch\ntorch.load(file)", 1),
        ("import torch\ntorch.load(file, weights_only=False)", 1),
        ("import torch\ntorch.load(file, weights_only=True)", 0),
        ("import pickle\nwith open(f) as file: pickle.load(file)", 1),
        ("np.load(file, allow_pickle=True)", 1),
        ("yaml.load(text, Loader=yaml.Loader)", 1),
    ],
)
def test_the_rule_catches(source: str, count: int) -> None:
    assert len(faults(source, "some.py")) == count
