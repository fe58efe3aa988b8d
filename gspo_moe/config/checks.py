"""What a config names outside itself: files, folders, packages. Checked before any process group starts. Torch-free."""

from __future__ import annotations

import importlib.util
import netrc
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from gspo_moe.config.architecture import Architecture, architecture_from_hf
from gspo_moe.config.outputs import output_fault
from gspo_moe.config.schema import Config, WandbConfig
from gspo_moe.errors import ConfigError

WANDB_MISSING = "logging.wandb is set, but wandb is not installed; run `pip install wandb` or set logging.wandb=null"


def check_files(config: Config, *, run_folder: bool = True) -> None:
    """Raises ConfigError with one line, naming key, value and fix, for each thing named but not there.

    run_folder: `logging` counts too.
    """
    found = [*_model(config), *_tokenizer(config), *(_logging(config) if run_folder else ())]
    if found:
        raise ConfigError("\n".join(found))


def check_reference(config: Config, architecture: Architecture) -> None:
    """Raises ConfigError where `algorithm.kl.reference` is no checkpoint of a model like the policy."""
    folder = config.algorithm.kl.reference
    if config.stage != "rl" or folder is None:
        return
    theirs, mine = architecture_from_hf(folder).model_dump(), architecture.model_dump()
    changed = [f"{name} is {theirs[name]} there and {mine[name]} here" for name in mine if theirs[name] != mine[name]]
    if changed:
        raise ConfigError(
            f"algorithm.kl.reference={folder} is another model ({'; '.join(changed)}); name one like the policy, or "
            "leave it out to take the run's first weights"
        )
    if not any(Path(folder).glob("*.safetensors")):
        raise ConfigError(f"algorithm.kl.reference={folder} holds no *.safetensors; convert its weights")


def check_vocabulary(tokens: int, architecture: Architecture) -> None:
    """Raises ConfigError where the model has fewer rows than the tokenizer has `tokens`."""
    if tokens > architecture.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokens} tokens and the model's vocab_size is {architecture.vocab_size}; give the "
            "tokenizer that the model was trained with (tokenizer.path)"
        )


def _model(config: Config) -> Iterator[str]:
    architecture: Architecture | None = None
    try:
        architecture = config.model.architecture(config.tokenizer.vocab_size)
    except ConfigError as error:
        key = "hf" if config.model.hf is not None else "checkpoint"
        yield f"model.{key}={config.model.folder}: {error}" if config.model.folder is not None else str(error)
    hf, checkpoint = config.model.hf, config.model.checkpoint
    needs_weights = hf is not None and Path(hf).is_dir() and not config.model.random_init
    if needs_weights and not any(Path(str(hf)).glob("*.safetensors")):
        yield f"model.hf={hf} holds no *.safetensors; convert its weights, or set model.random_init=true"
    if checkpoint is not None and not (Path(checkpoint) / "metadata.json").is_file():
        yield (
            f"model.checkpoint={checkpoint} is no distributed checkpoint (it has no metadata.json); give a run's "
            "checkpoints/step_* or what `gspo-moe convert` wrote, or set model.hf for a Hugging Face folder"
        )
    if architecture is None:
        return
    longest = architecture.max_positions
    plain = architecture.max_position_embeddings
    extended = f", which YaRN extends to {longest}" if longest != plain else ""
    for key in ("rollout", "evaluation"):
        limit = getattr(config, key).max_response_tokens
        if limit is not None and limit >= longest:
            yield (
                f"{key}.max_response_tokens={limit} leaves no room for a prompt in the "
                f"model's max_position_embeddings={plain}{extended}; lower it below {longest}"
            )
    trains_tokenizer = config.model.folder is None and config.tokenizer.kind != "hf" and config.tokenizer.path is None
    if trains_tokenizer and config.tokenizer.vocab_size > architecture.vocab_size:
        yield (
            f"tokenizer.vocab_size={config.tokenizer.vocab_size} exceeds the model's vocab_size="
            f"{architecture.vocab_size}; lower it to that"
        )


def _tokenizer(config: Config) -> Iterator[str]:
    path = config.tokenizer.path
    if path is not None and not Path(path).exists():
        yield f"tokenizer.path={path} does not exist; give an existing tokenizer, or null for the default"


def _logging(config: Config) -> Iterator[str]:
    run = config.run_path
    fault = output_fault(run, folder=True) or output_fault(run / "checkpoints", folder=True)
    if fault is not None:
        yield f"logging.run_dir={fault}"
    if config.logging.wandb is None:
        return
    if importlib.util.find_spec("wandb") is None:
        yield WANDB_MISSING
    elif wandb_mode(config.logging.wandb) == "online" and not _has_wandb_key():
        yield (
            "logging.wandb would go online and finds no key; run `wandb login`, set WANDB_API_KEY, or set "
            "logging.wandb.mode=offline (WANDB_MODE=offline in the environment)"
        )


def wandb_mode(settings: WandbConfig) -> str:
    """`logging.wandb.mode`, where it is null the environment's."""
    if settings.mode is not None:
        return settings.mode
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "disabled"
    return os.environ.get("WANDB_MODE", "online")


def _has_wandb_key() -> bool:
    """Whether wandb finds one as it looks for it: in the environment, or where `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    files = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path("~/.netrc"), Path("~/_netrc")]
    for file in (each.expanduser() for each in files):
        try:
            if file.is_file() and netrc.netrc(file).authenticators(host) is not None:
                return True
        except (OSError, netrc.NetrcParseError):
            return True  # wandb reads it its own way
    return False
