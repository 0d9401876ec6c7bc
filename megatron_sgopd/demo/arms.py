"""Lists what the demonstration compares, and what its phases override in the recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sgopd.config.recipe_files import RECIPES
from megatron_sgopd.demo.world import QUICK_SIZES, WorldSizes

DEMO_RECIPES = RECIPES / "demo"
BASELINE = "opd"
DEFAULT_ARMS = (BASELINE, "sg_opd", "sg_opd_full_vocab")

# The keys in which the arms' resolved configs differ; a test holds them to it.
ARM_DIFFERENCES = frozenset(
    {"name", "distill.method", "distill.estimator", "distill.phases.enabled"}
)

LIFT_BAR = 0.30  # avg@k that distillation is to add to the student's, on test

# Seconds measured on 2 cores, for the estimate at the start.
TRAINING_SECONDS, QUICK_TRAINING_SECONDS = 90, 20


@dataclass(frozen=True)
class Training:
    """One run of the trainer. `{home}` in an override stands for the world's folder."""

    name: str
    recipe: Path
    overrides: tuple[str, ...]
    needs: tuple[str, ...]  # phases whose results it reads


def available_arms(recipes: Path = DEMO_RECIPES) -> list[str]:
    """Every recipe of the folder but the teacher's and the student's; the baseline comes first."""
    names = {path.stem for path in recipes.glob("*.yaml")} - {"teacher", "student"}
    return sorted(names, key=lambda name: (name != BASELINE, name))


def chosen_arms(wanted: str | None, recipes: Path = DEMO_RECIPES) -> list[str]:
    """`wanted` is None (the default arms), `all`, or names with commas.

    ValueError names an arm without a recipe.
    """
    available = available_arms(recipes)
    if wanted == "all":
        return available
    names = list(DEFAULT_ARMS) if wanted is None else [n for n in wanted.split(",") if n]
    for name in names:
        if name not in available:
            raise ValueError(
                f"there is no arm {name!r}: {recipes} has recipes for {', '.join(available)}"
            )
    if not names:
        raise ValueError(f"no arm was named; {recipes} has {', '.join(available)}")
    return list(dict.fromkeys(names))


def trainings(
    arms: Sequence[str],
    *,
    seed: int,
    quick: bool,
    extra: Sequence[str],
    engine: str = "embedded",
    recipes: Path = DEMO_RECIPES,
) -> list[Training]:
    """Teacher, student and the arms, in the order in which they run."""
    world = "{home}/world"
    common = [f"seed={seed}", f"evaluation.data={world}/test.jsonl"]
    plans = []
    for role in ("teacher", "student"):
        overrides = [
            *common,
            f"model.student.hf_path={{home}}/world/models/{role}",
            f"data.train={world}/{role}_sft.jsonl",
            *(_quick_overrides(_sft_steps(role)) if quick else ()),
        ]
        plans.append(_training(role, overrides, ("world",), extra, recipes))
    for arm in arms:
        overrides = [
            *common,
            "model.student.hf_path={home}/student/hf",
            "model.teacher.hf_path={home}/teacher/hf",
            f"data.train={world}/train.jsonl",
            f"evaluation.during_data={world}/dev.jsonl",
            f"rollout.engine={engine}",
            *((*_quick_overrides(3), *_QUICK_ARM) if quick else ()),
        ]
        plans.append(_training(arm, overrides, ("world", "teacher", "student"), extra, recipes))
    return plans


def _training(
    name: str,
    overrides: Sequence[str],
    needs: tuple[str, ...],
    extra: Sequence[str],
    recipes: Path,
) -> Training:
    return Training(name, recipes / f"{name}.yaml", (*overrides, *extra), needs)


def _sft_steps(role: str, sizes: WorldSizes = QUICK_SIZES) -> int:
    rows = sizes.teacher if role == "teacher" else sizes.student_noisy + sizes.student_terse
    return rows // 64


def _quick_overrides(steps: int) -> tuple[str, ...]:
    """A few steps on a few problems: every part runs, nothing is learnt."""
    return (f"num_steps={steps}", "optimizer.lr_warmup_steps=1", "evaluation.k=2")


# For the arms alone: supervised runs have no development set, and would look at the test problems.
_QUICK_ARM = (
    "rollout.num_prompts=8",
    "evaluation.every=2",
    "evaluation.during_k=2",
    "evaluation.during_max_problems=4",
    "logging.rollouts_every=1",
)
