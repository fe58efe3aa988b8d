"""A model's folder with a tokenizer that has ChatML's template: a byte is a token, but for special ones."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests.qwen3 import architecture, reference_model

END, START = "<|im_end|>", "<|im_start|>"
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
BYTES = pre_tokenizers.ByteLevel.alphabet()
SIZES = architecture(vocab_size=len(BYTES) + 2, initializer_range=0.25, max_position_embeddings=256)


def chatml_model(folder: Path) -> Path:
    """Random weights, the same at every call, as transformers saves them, with the tokenizer beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    reference_model(SIZES).save_pretrained(folder)
    vocabulary = {END: 0, START: 1, **{letter: number for number, letter in enumerate(sorted(BYTES), start=2)}}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, START])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "chat_template": TEMPLATE}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder
