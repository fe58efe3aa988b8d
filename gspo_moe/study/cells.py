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
NUMERICS = "rollout.numerics"


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


def cold_start_job(study: Study, here: Path) -> Job | None:
    """The run that every cell starts from; None where the base config has a model of its own.

    Raises ConfigError as `cells` does: banks and cells that are there were made from the one that is there.
    """
    if study.cold_start is None:
        return None
    folder = study.folder / COLD_START
    settings = settings_as_overrides(study.cold_start.set, {"logging.run_dir": str(folder)})
    arguments = ("train", str(here / study.cold_start.base), *settings)
    _check_same(folder, load_config(arguments[1], settings))
    return Job(COLD_START, arguments, folder, folder / "hf")


def bank_jobs(study: Study, here: Path) -> list[Job]:
    """A bank for each seed and `rollout.numerics` of an arm, of the rollouts that its first step would make."""
    if study.bank is None:
        return []
    jobs = []
    kinds = dict.fromkeys(arm.settings.get(NUMERICS) for arm in arms(study) if arm.mode == BANK)
    for seed, numerics in product(study.seeds, kinds):
        made = _bank(study, seed, numerics)
        folder = made.with_suffix("")
        own: Settings = {"schedule.steps": 1, "algorithm.mini_batches": max(study.bank.mini_batches), "seed": seed}
        own["logging.run_dir"] = str(folder)
        if numerics is not None:
            own[NUMERICS] = numerics
        # Any arm may replay the engine's routes.
        routes: Settings = {"routing.engine_routes": True, "routing.replay": "none"}
        settings = settings_as_overrides(study.set, study.bank.set, own, routes, _start(study))
        arguments = ("bank", str(here / study.base), str(made), *settings)
        jobs.append(Job(f"bank {made.stem}", arguments, folder, made, _needs(study)))
    return jobs


def cells(study: Study, here: Path) -> list[Cell]:
    """Every run of the study, seeds outermost, so that a stopped study has whole pairs.

    Raises ConfigError for settings that do not fit, and for a cell's folder with a run of other settings.
    """
    return [_cell(study, here, arm, seed) for seed in study.seeds for arm in arms(study)]


def _cell(study: Study, here: Path, arm: Arm, seed: int) -> Cell:
    folder = study.folder / arm.name / f"seed{seed}"
    own: Settings = {"seed": seed, "logging.run_dir": str(folder)}
    needs = _needs(study)
    if arm.mode == BANK:
        bank = _bank(study, seed, arm.settings.get(NUMERICS))
        own["rollout.bank"] = str(bank)
        needs = (*needs, bank)
    overrides = settings_as_overrides(_checkpoints(study, here), study.set, arm.settings, own, _start(study))
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


def _start(study: Study) -> Settings:
    return {} if study.cold_start is None else {"model.preset": None, "model.hf": str(study.folder / COLD_START / "hf")}


def _needs(study: Study) -> tuple[Path, ...]:
    return () if study.cold_start is None else (study.folder / COLD_START / "hf",)


def _bank(study: Study, seed: int, numerics: str | None) -> Path:
    """numerics: of an arm that sets its own."""
    name = f"seed{seed}" if numerics is None else f"seed{seed}_{numerics}"
    return study.folder / BANKS / f"{name}.safetensors"


def _check_same(folder: Path, config: Config) -> None:
    changed = changes(folder, config, WORK)
    if changed:
        raise ConfigError(
            f"{folder} holds a run of other settings ({'; '.join(changed)}); give the study another name, restore "
            "these, or remove the folder"
        )
