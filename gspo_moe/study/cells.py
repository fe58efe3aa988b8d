"""A study's cells: which runs it consists of, with which settings, and which of them are finished."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from gspo_moe.config.checkpoints import checkpoint_name
from gspo_moe.config.continuing import FINISHED_FILE, WORK, changes
from gspo_moe.config.loading import load_config, read_values
from gspo_moe.config.schema import Config
from gspo_moe.errors import ConfigError
from gspo_moe.study.spec import BANKS, COLD_START, Settings, Study, settings_as_overrides

ONLINE, BANK = "online", "bank"
ROLLOUTS = ("rollout.", "task.")  # an arm's settings that make its rollouts others


@dataclass(frozen=True)
class Arm:
    """One curve of the study. mini_batches: N of a bank arm, None online. of: the arm in the study's file."""

    name: str
    of: str
    mode: str
    mini_batches: int | None
    settings: Settings


@dataclass(frozen=True)
class Job:
    """One process group to run: `command` of gspo-moe with these arguments, done when `product` is there.

    starts_anew: what an interrupted run left has no checkpoint to go on from.
    """

    title: str
    arguments: tuple[str, ...]
    folder: Path
    product: Path
    needs: tuple[Path, ...] = ()
    starts_anew: bool = False

    @property
    def done(self) -> bool:
        return self.product.exists()


@dataclass(frozen=True)
class Cell:
    """One run of one arm with one seed."""

    arm: Arm
    seed: int
    job: Job
    config: Config

    @property
    def steps(self) -> int:
        return self.config.schedule.steps


def arms(study: Study) -> list[Arm]:
    """Every arm in every mode: online ones under their own names, bank ones with their N behind it."""
    found = []
    if study.online is not None:
        found += [Arm(name, name, ONLINE, None, study.online.set | settings) for name, settings in study.arms.items()]
    if study.bank is not None:
        for count in study.bank.mini_batches:
            own: Settings = {"schedule.steps": 1, "algorithm.mini_batches": count}
            if count == 1:  # no ratio has moved yet, so there is nothing to split
                own["routing.attribution"] = False
            found += [
                Arm(f"{name}.bank_n{count}", name, BANK, count, study.bank.set | settings | own)
                for name, settings in study.arms.items()
            ]
    return found


def cold_start_jobs(study: Study, here: Path) -> list[Job]:
    """The run that every cell starts from, or one for each seed; none where the base config has a model of its own.

    Raises ConfigError as `cells` does: banks and cells that are there were made from the ones that are there.
    """
    if study.cold_start is None:
        return []
    jobs = {}
    for seed in study.seeds:
        folder = _cold_start(study, seed)
        own: Settings = {"logging.run_dir": str(folder)} | ({"seed": seed} if study.cold_start.each_seed else {})
        settings = settings_as_overrides(study.cold_start.set, own)
        arguments = ("train", str(here / study.cold_start.base), *settings)
        _check_same(folder, load_config(arguments[1], settings))
        jobs[folder] = Job(folder.name, arguments, folder, folder / "hf")
    return list(jobs.values())


def bank_jobs(study: Study, here: Path) -> list[Job]:
    """A bank of each seed's rollouts for each way in which the arms make them, as their first step would."""
    if study.bank is None:
        return []
    jobs = {}
    for seed, (name, settings) in product(study.seeds, study.arms.items()):
        made = _bank(study, seed, name)
        folder = made.with_suffix("")
        own: Settings = {"schedule.steps": 1, "algorithm.mini_batches": max(study.bank.mini_batches), "seed": seed}
        own["logging.run_dir"] = str(folder)
        # Any arm may replay the engine's routes.
        own |= {"routing.engine_routes": True, "routing.replay": "none"}
        overrides = settings_as_overrides(study.set, study.bank.set, _rollouts(settings), own, _start(study, seed))
        arguments = ("bank", str(here / study.base), str(made), *overrides)
        jobs[made] = Job(f"bank {made.stem}", arguments, folder, made, _needs(study, seed))
    return list(jobs.values())


def cells(study: Study, here: Path) -> list[Cell]:
    """Every run of the study, seeds outermost, so that a stopped study has whole pairs.

    Raises ConfigError for settings that do not fit, and for a cell's folder with a run of other settings.
    """
    return [_cell(study, here, arm, seed) for seed in study.seeds for arm in arms(study)]


def _cell(study: Study, here: Path, arm: Arm, seed: int) -> Cell:
    folder = study.folder / arm.name / f"seed{seed}"
    own: Settings = {"seed": seed, "logging.run_dir": str(folder)}
    needs = _needs(study, seed)
    if arm.mode == BANK:
        bank = _bank(study, seed, arm.of)
        own["rollout.bank"] = str(bank)
        needs = (*needs, bank)
    overrides = settings_as_overrides(_checkpoints(study, here), study.set, arm.settings, own, _start(study, seed))
    config = load_config(here / study.base, overrides)
    product, keeps = folder / "checkpoints" / checkpoint_name(config.schedule.steps), config.checkpoint.keep > 0
    if not keeps and not product.exists():
        product = folder / FINISHED_FILE
    _check_same(folder, config)
    arguments = ("train", str(here / study.base), *overrides)
    return Cell(arm, seed, Job(f"{arm.name} seed{seed}", arguments, folder, product, needs, not keeps), config)


def _checkpoints(study: Study, here: Path) -> Settings:
    """None are kept, three times a model's size each, unless the base config says how many."""
    written = read_values(here / study.base).get("checkpoint")
    return {} if isinstance(written, dict) and "keep" in written else {"checkpoint.keep": 0}


def _cold_start(study: Study, seed: int) -> Path:
    each_seed = study.cold_start is not None and study.cold_start.each_seed
    return study.folder / (f"{COLD_START}_seed{seed}" if each_seed else COLD_START)


def _start(study: Study, seed: int) -> Settings:
    if study.cold_start is None:
        return {}
    return {"model.preset": None, "model.hf": str(_cold_start(study, seed) / "hf")}


def _needs(study: Study, seed: int) -> tuple[Path, ...]:
    return () if study.cold_start is None else (_cold_start(study, seed) / "hf",)


def _rollouts(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key.startswith(ROLLOUTS)}


def _bank(study: Study, seed: int, arm: str) -> Path:
    """The bank that an arm learns from, named after the first arm with its rollouts where they are not the base's."""
    own = _rollouts(study.arms[arm])
    name = next(name for name, settings in study.arms.items() if _rollouts(settings) == own)
    return study.folder / BANKS / (f"seed{seed}_{name}.safetensors" if own else f"seed{seed}.safetensors")


def _check_same(folder: Path, config: Config) -> None:
    changed = changes(folder, config, WORK)
    if changed:
        raise ConfigError(
            f"{folder} holds a run of other settings ({'; '.join(changed)}); give the study another name, restore "
            "these, or remove the folder"
        )
