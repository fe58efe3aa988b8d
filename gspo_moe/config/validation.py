"""Turns what pydantic finds into one ConfigError: a line each, naming key, value and fix. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gspo_moe.errors import ConfigError

Schema = TypeVar("Schema", bound=BaseModel)

LONGEST_VALUE = 60
# What verl, TRL, ms-swift, slime and megatron-core call our keys.
SYNONYMS = {
    "seed": "random_seed data_seed",
    "model.hf": "model_name_or_path pretrained_model_name_or_path model_path hf_checkpoint model.path model.name",
    "model.dtype": "torch_dtype precision bf16 fp16",
    "chat.system": "system_prompt",
    "chat.template": "chat_template",
    "chat.thinking": "enable_thinking",
    "parallel.tensor": "tensor_model_parallel_size tensor_parallel_size tp_size tp",
    "parallel.pipeline": "pipeline_model_parallel_size pipeline_parallel_size pp_size pp",
    "parallel.virtual_pipeline": "virtual_pipeline_model_parallel_size vpp",
    "parallel.expert": "expert_model_parallel_size expert_parallel_size ep_size ep",
    "parallel.expert_tensor": "expert_tensor_parallel_size etp_size etp",
    "parallel.context": "context_parallel_size cp_size cp",
    "parallel.distributed_optimizer": "use_distributed_optimizer",
    "parallel.recompute": "gradient_checkpointing enable_gradient_checkpointing recompute_granularity",
    "algorithm.name": "adv_estimator advantage_estimator loss_type policy_loss",
    "algorithm.clip_low": "epsilon clip_ratio clip_ratio_low eps_clip clip_eps cliprange epsilon_low",
    "algorithm.clip_high": "epsilon_high clip_ratio_high eps_clip_high",
    "algorithm.mini_batches": "num_mini_batches",
    "algorithm.dynamic_sampling": "dynamic_sample filter_groups",
    "algorithm.kl.coeff": "beta kl_coef kl_coeff kl_loss_coef init_kl_coef kl_beta",
    "rollout.prompts_per_step": "batch_size train_batch_size rollout_batch_size per_device_train_batch_size",
    "rollout.samples_per_prompt": "num_generations group_size n_samples_per_prompt num_samples_per_prompt rollout.n",
    "rollout.max_response_tokens": "max_new_tokens max_completion_length max_response_length response_length",
    "rollout.max_prompt_tokens": "max_prompt_length prompt_length",
    "rollout.stop": "stop_words stop_strings stop_sequences",
    "task.reward": "reward_func reward_funcs reward_fn reward_function reward_functions custom_reward_function rm_type",
    "task.data.train": "train_file train_files prompt_data data_path dataset dataset_name train_dataset data.train",
    "task.data.eval": "val_file val_files eval_file eval_files test_file test_files eval_dataset eval_prompt_data",
    "optimizer.lr": "learning_rate actor_lr max_lr",
    "optimizer.decay": "lr_scheduler lr_scheduler_type lr_decay_style",
    "optimizer.warmup_updates": "warmup_steps lr_warmup_steps num_warmup_steps warmup_iters",
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "adam_epsilon adam_eps optimizer.epsilon",
    "optimizer.clip_grad": "max_grad_norm grad_clip clip_grad_norm gradient_clipping",
    "schedule.steps": "max_steps total_steps total_training_steps num_rollout train_iters",
    "schedule.micro_batch_tokens": "max_tokens_per_gpu ppo_max_token_len_per_gpu micro_batch_size",
    "evaluation.interval": "eval_steps eval_interval test_freq",
    "checkpoint.interval": "save_steps save_interval save_freq",
    "checkpoint.keep": "save_total_limit",
    "logging.run_dir": "output_dir save_dir checkpoint_dir log_dir default_local_dir",
    "logging.wandb": "use_wandb report_to",
    "logging.wandb.project": "wandb_project project_name",
}
_MEANING = {name: key for key, names in SYNONYMS.items() for name in names.split()}


def validated(schema: type[Schema], values: Mapping[str, Any], prefix: str = "") -> Schema:
    """Builds `schema` from plain values.

    prefix: what to print before each key, such as `model.overrides.`.
    Raises ConfigError with one line for each thing that is wrong.
    """
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_line(schema, detail, prefix) for detail in error.errors())) from None


def meant_key(schema: type[BaseModel], dotted: str) -> str | None:
    """The valid key that an unknown `dotted` stands for: by meaning, else a like one of its section; None without one.

    By meaning: other programs' names for it, and the same name in one other section.
    """
    *sections, name = [part for part in dotted.split(".") if not part.isdigit()]
    keys = list(_keys(schema))
    meaning = _MEANING.get(".".join((*sections, name)), _MEANING.get(name))
    if meaning in keys:
        return meaning
    elsewhere = [key for key in keys if key.rpartition(".")[2] == name]
    if len(elsewhere) == 1:
        return elsewhere[0]
    section = ".".join(sections)
    beside = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == section]
    like = get_close_matches(name, beside, n=1)
    return ".".join((*sections, like[0])) if like else None


def _siblings(schema: type[BaseModel], dotted: str) -> str:
    section = ".".join(part for part in dotted.split(".")[:-1] if not part.isdigit())
    return ", ".join(key.rpartition(".")[2] for key in _keys(schema) if key.rpartition(".")[0] == section)


def _keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _keys(inner, f"{prefix}{name}.")


def _line(schema: type[BaseModel], detail: ErrorDetails, prefix: str) -> str:
    dotted = ".".join(str(part) for part in detail["loc"])
    value, message = detail["input"], detail["msg"]
    key = f"{prefix}{dotted}={shortened(value)}"
    if detail["type"] == "extra_forbidden":
        meant = meant_key(schema, dotted)
        if meant is None:
            return f"unknown key {key}; leave it out, or take one of {_siblings(schema, dotted)}"
        return f"unknown key {key}; the nearest valid key is {prefix}{meant}"
    if detail["type"] == "missing":
        return f"{prefix}{dotted} is missing; set it"
    if detail["type"] == "value_error":
        rule = str(detail["ctx"]["error"])
        about_section = isinstance(value, Mapping | BaseModel)
        if about_section and not prefix:
            return rule
        where = prefix.rstrip(".:") if about_section else key
        return "\n".join(f"{where}: {fault}" for fault in rule.split("\n"))
    if detail["type"] in ("model_type", "dict_type"):
        return f"{key}: expected a section, that is keys with values"
    if detail["type"] == "string_type":
        return f"{key}: expected text; put it in quotes"
    return f"{key}: expected {message.removeprefix('Input should be ')}"


def shortened(value: Any) -> str:
    """For a message: its first 60 characters."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
