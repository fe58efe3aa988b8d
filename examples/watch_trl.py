"""What the router does while TRL's GRPOTrainer trains: `python examples/watch_trl.py`, with trl installed, no network.

A tiny random Qwen3 MoE learns to say "a". Two lines are the measurement: the import and `log_routing`.
"""

import argparse
import json
import tempfile

from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer

from gspo_moe.watching.trl import log_routing

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--lr", type=float, default=3e-3)
options = parser.parse_args()

set_seed(1)
letters = Tokenizer(models.WordLevel({letter: n for n, letter in enumerate("_^abcdefghij ")}, unk_token="_"))
letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="_", eos_token="^")
model_config = Qwen3MoeConfig(
    vocab_size=13, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=16, num_experts_per_tok=2,
    initializer_range=0.2, pad_token_id=0, eos_token_id=1, max_position_embeddings=64,
)  # fmt: skip


def says_a(completions: list[str], **more: object) -> list[float]:
    return [text.count("a") / max(len(text), 1) for text in completions]


prompts = ["abc ", "def ", "ghi ", "jab "]
with tempfile.TemporaryDirectory() as folder:
    training = GRPOConfig(
        output_dir=folder, max_steps=options.steps, learning_rate=options.lr, per_device_train_batch_size=8,
        num_generations=4, max_completion_length=8, logging_steps=1, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, seed=1, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=Qwen3MoeForCausalLM(model_config),
        processing_class=tokenizer,
        reward_funcs=says_a,
        train_dataset=Dataset.from_dict({"prompt": prompts * 8}),
        args=training,
    )
    log_routing(trainer, [(prompt, answer) for prompt in prompts for answer in ("aaaa", "bcdefgh")])
    trainer.train()
for record in trainer.state.log_history[:-1]:  # the last one sums the run up
    names = ("step", "reward", "entropy", "routing/update/slot_change", "routing/update/any_layer_flip")
    phi = ("routing/update/phi_sequence", "routing/update/washout", "routing/update/noise_floor/slot_change")
    print(json.dumps({name: round(record[name], 4) for name in (*names, *phi) if name in record}))
