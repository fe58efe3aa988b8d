"""Arms x seeds from one cold start, run as processes and compared in pairs."""

from gspo_moe.study.study import Plan, plan_study, run_study

__all__ = ["Plan", "plan_study", "run_study"]
