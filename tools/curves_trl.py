"""Rewards of TRL's steps on a config's own task, from the weights and with the tokenizer of model.hf.

    python tools/curves_trl.py CONFIG.yaml [section.key=value ...] --json FILE

`schedule.steps` steps of `GRPOTrainer` with importance_sampling_level="sequence", as `tools/trl_step.py` sets it up
from the config; the task's prompts in our order. `tools/benchmark_peers.py --curves` calls it with TRL's Python.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script that is run by its path Python knows only the folder
from gspo_moe.config import load_config
from gspo_moe.data.tokenizers import SPACE_PIECE, SentencePieceTokenizer
from gspo_moe.tasks import make_task
from gspo_moe.tasks.protocol import Task
from gspo_moe.types import Prompt, Turn
from tools.trl_step import Work, load_model, make_trainer, trl_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of an RL run with model.hf")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    options = parser.parse_intermixed_args()
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_DISABLED": "true"})
    config = load_config(options.config, options.overrides)
    assert config.model.hf is not None
    task, steps = make_task(config.task, config.seed), config.schedule.steps
    prompts = [task.prompts.prompt("train", i) for i in range(config.rollout.prompts_per_step * steps)]
    ours = SentencePieceTokenizer.load(Path(config.model.hf) / "tokenizer.model")
    tokenizer = same_tokenizer(ours, [prompt.text for prompt in prompts])
    work = Work([{"prompt": prompt.text} for prompt in prompts], tokenizer, reward_of(task, prompts))
    longest = max(len(ours.encode(prompt.text)) for prompt in prompts)
    with tempfile.TemporaryDirectory() as folder:
        trainer, watch = make_trainer(load_model(config), work, trl_config(config, longest, steps, Path(folder)))
        trainer.train()
    options.json.write_text(json.dumps({"rewards": [step.reward for step in watch.steps]}) + "\n")


def same_tokenizer(ours: SentencePieceTokenizer, texts: list[str]) -> Any:
    """transformers' tokenizer of the same pieces: single characters, and bytes for the others; equal ids on the texts.

    Only the end is special, so that all else that is sampled is in the text that the reward sees.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    processor = ours._processor
    pieces = [processor.id_to_piece(i) for i in range(ours.vocab_size)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    words = Tokenizer(models.BPE(vocab, [], unk_token=pieces[processor.unk_id()], byte_fallback=True))
    words.normalizer = normalizers.Replace(" ", SPACE_PIECE)
    words.decoder = decoders.Sequence([decoders.Replace(SPACE_PIECE, " "), decoders.ByteFallback(), decoders.Fuse()])
    end = pieces[ours.eos_id]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token=end)
    for text in texts:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ours.encode(text), text
        assert tokenizer.decode(ours.encode(text)) == text, text
    assert len(tokenizer) == ours.vocab_size
    return tokenizer


def reward_of(task: Task, prompts: list[Prompt]) -> Callable[..., list[float]]:
    """The task's reward of answers, in the form of TRL's functions."""
    by_text = {prompt.text: prompt for prompt in prompts}

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        found = [task.rubric.reward(by_text[prompt], (Turn("policy", answer),)) for prompt, answer in pairs]
        assert all(isinstance(value, float) for value in found), "a reward in parts"
        return [float(value) for value in found]  # type: ignore[arg-type]

    return reward


if __name__ == "__main__":
    main()
