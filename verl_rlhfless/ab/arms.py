"""The arms: each one way to run the same recipe on the same GPUs, as overrides that are appended to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from verl_rlhfless.ab.probe import RecipeFacts
from verl_rlhfless.config import TRAINER_MODE
from verl_rlhfless.errors import ConfigError
from verl_rlhfless.schema import what_to_do

STOCK = "stock"
ALIASES = {"sync": STOCK}
"""verl's own name of its synchronous trainer."""

_MODE = "trainer.v1.trainer_mode"
_ROLLOUT = "actor_rollout_ref.rollout"
_SEPARATE = ("separate_async", "separate_async_switch")
_ROUTING = {
    "dispatcher": ("rlhfless/dispatcher=stock",),
    "dedup": ("rlhfless/prefix_dedup=off",),
    "migration": ("rlhfless/migration=off",),
}
_LEASING = {
    "fusion": ("rlhfless/fusion=off",),
    "parking": ("rlhfless.pool.park=never",),
}
_NO_ROUTING = tuple(override for overrides in _ROUTING.values() for override in overrides)
_LEFT_OUT = {
    "resident": {"router-only": _NO_ROUTING, **{f"no-{part}": overrides for part, overrides in _ROUTING.items()}},
    "elastic": {
        "router-only": _NO_ROUTING,
        **{f"no-{part}": overrides for part, overrides in (_ROUTING | _LEASING).items()},
    },
}

NAMES = (
    STOCK,
    "colocate_async",
    *_SEPARATE,
    *(name for arm, parts in _LEFT_OUT.items() for name in (arm, *(f"{arm}-{what}" for what in parts))),
)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the same recipe.

    Attributes:
        name: As in ``--arms``.
        overrides: What is appended to the recipe.
        is_asynchronous: Whether samples may be older than the weights that they train: another algorithm, whose
            learning is not comparable.
        pulls_weights: Whether replicas of its own pull their weights from the store.
        is_ours: Whether parts of this plugin are active.
    """

    name: str
    overrides: tuple[str, ...]
    is_asynchronous: bool = False
    pulls_weights: bool = False
    is_ours: bool = False

    def with_overrides(self, *overrides: str) -> Arm:
        """Return the arm with further overrides at the end."""
        return replace(self, overrides=(*self.overrides, *overrides))


def ablated(arm: Arm) -> list[Arm]:
    """Return ``arm`` as it is, with our router alone, and without each part; stock verl has no part to leave out."""
    parts = _LEFT_OUT.get(arm.name, {})
    return [arm, *(replace(arm, name=f"{arm.name}-{what}").with_overrides(*off) for what, off in parts.items())]


def parse_names(text: str) -> tuple[str, ...]:
    """Return the names of the arms that ``--arms`` asks for.

    Raises:
        ConfigError: An unknown arm, one twice, or none.
    """
    names = tuple(ALIASES.get(name.strip(), name.strip()) for name in text.split(","))
    for name in names:
        if name not in NAMES:
            raise ConfigError(
                "--arms",
                name,
                f"must be among {', '.join(NAMES)}",
                what_to_do(name, NAMES, "Separate several by commas."),
            )
    if len(set(names)) < len(names):
        raise ConfigError("--arms", text, "must name each arm once", "Use --arms stock,elastic.")
    return names


def build_arms(
    names: Sequence[str], facts: RecipeFacts, trainer_gpus: int | None, plugin_overrides: Sequence[str]
) -> list[Arm]:
    """Return the arms of a recipe; all have its budget.

    Args:
        names: Which.
        facts: What the recipe resolves to.
        trainer_gpus: GPUs of the trainer. ``None`` = in the elastic arm all of the recipe's if the trainer may leave
            them during rollouts, as with the README's overrides; else see :func:`default_split`.
        plugin_overrides: Appended to our arms only.

    Raises:
        ConfigError: An arm is impossible on the recipe's budget, platform or verl.
    """
    arms = [_build(name, facts, trainer_gpus) for name in names]
    return [arm.with_overrides(*plugin_overrides) if arm.is_ours else arm for arm in arms]


def _build(name: str, facts: RecipeFacts, trainer_gpus: int | None) -> Arm:
    if name == STOCK:
        return Arm(name, ("+rlhfless=off", f"{_MODE}=sync"))
    if name == "colocate_async":
        return Arm(name, ("+rlhfless=off", f"{_MODE}=colocate_async"), is_asynchronous=True)
    if name in _SEPARATE:
        return _separate(name, facts, trainer_gpus)
    whole = name.partition("-")[0]
    arm = _resident() if whole == "resident" else _elastic(facts, trainer_gpus)
    return next(variant for variant in ablated(arm) if variant.name == name)


def _resident() -> Arm:
    return Arm("resident", ("+rlhfless=resident", f"{_MODE}={TRAINER_MODE}"), is_ours=True)


def _elastic(facts: RecipeFacts, trainer_gpus: int | None) -> Arm:
    if trainer_gpus is None:
        trainer_gpus = facts.trainer_gpus if facts.can_leave else default_split(facts) or facts.trainer_gpus
    if facts.trainer_gpus < facts.tp:
        rule = f"a replica needs {facts.tp} GPUs and the recipe has {facts.trainer_gpus}"
        action = "Raise it, or lower the rollout's size."
        raise ConfigError("trainer.n_gpus_per_node", facts.gpus_per_node, rule, action)
    if trainer_gpus == facts.trainer_gpus:  # the trainer leaves during rollouts, and replicas have all GPUs
        nnodes, per_node = facts.nnodes, facts.gpus_per_node
    else:
        nnodes, per_node = _shape(facts, trainer_gpus)
    overrides = (
        f"trainer.nnodes={nnodes}",
        f"trainer.n_gpus_per_node={per_node}",
        "+rlhfless=default",
        f"rlhfless.pool.max_gpus={facts.trainer_gpus}",
        f"{_MODE}={TRAINER_MODE}",
    )
    return Arm("elastic", overrides, pulls_weights=True, is_ours=True)


def _separate(name: str, facts: RecipeFacts, trainer_gpus: int | None) -> Arm:
    if facts.is_on_cpu:
        rule = "needs a collective weight transfer (nccl), which a host without GPUs does not have"
        raise ConfigError("--arms", name, rule, "Leave it out, or run the comparison on GPUs.")
    if name == "separate_async_switch" and not facts.has_switch:
        rule = "this verl cannot lend idle trainer GPUs to the rollout"
        raise ConfigError("--arms", name, rule, "Use separate_async, or verl 0.9.1 or later.")
    nnodes, per_node = _shape(facts, trainer_gpus)
    if nnodes == facts.nnodes:
        rollout_nnodes, rollout_per_node = nnodes, facts.gpus_per_node - per_node
    else:
        rollout_nnodes, rollout_per_node = facts.nnodes - nnodes, facts.gpus_per_node
    overrides = (
        f"trainer.nnodes={nnodes}",
        f"trainer.n_gpus_per_node={per_node}",
        f"{_ROLLOUT}.nnodes={rollout_nnodes}",
        f"{_ROLLOUT}.n_gpus_per_node={rollout_per_node}",
        f"{_ROLLOUT}.checkpoint_engine.backend=nccl",
        f"trainer.v1.separate_async.parameter_sync_step={max(1, facts.prompts // facts.mini_batch)}",
        f"trainer.v1.separate_async.hybrid_rollout.enable_switch={name == 'separate_async_switch'}",
        "+rlhfless=off",
        f"{_MODE}=separate_async",
    )
    return Arm(name, overrides, is_asynchronous=True)


def default_split(facts: RecipeFacts) -> int | None:
    """Return how many GPUs the trainer keeps: the most that is no more than half, so that rollout has the other half.

    Whole replicas fit into the rest, and the samples of a mini batch divide among the trainer's ranks. ``None`` = no
    such number.
    """
    fitting = (gpus for gpus in range(facts.trainer_gpus // 2, 0, -1) if _why_not(facts, gpus) is None)
    return next(fitting, None)


def _shape(facts: RecipeFacts, trainer_gpus: int | None) -> tuple[int, int]:
    """Return (nodes, GPUs per node) of the trainer where the rollout has GPUs of its own."""
    if trainer_gpus is None:
        trainer_gpus = default_split(facts)
        if trainer_gpus is None:
            rule = f"{facts.trainer_gpus} GPUs are too few for a trainer and a replica of {facts.tp} GPUs beside it"
            raise ConfigError(
                "trainer.n_gpus_per_node", facts.gpus_per_node, rule, "Use --arms stock,elastic,resident."
            )
    elif (rule_ := _why_not(facts, trainer_gpus)) is not None:
        split = default_split(facts)
        action = f"Try --trainer-gpus {split}." if split else "Leave it out."
        raise ConfigError("--trainer-gpus", trainer_gpus, rule_, action)
    if trainer_gpus % facts.nnodes == 0:
        return facts.nnodes, trainer_gpus // facts.nnodes
    return trainer_gpus // facts.gpus_per_node, facts.gpus_per_node


def _why_not(facts: RecipeFacts, trainer_gpus: int) -> str | None:
    rest = facts.trainer_gpus - trainer_gpus
    if trainer_gpus < 1 or rest < facts.tp:
        return f"must be >= 1 and leave a replica's {facts.tp} of the recipe's {facts.trainer_gpus} GPUs"
    if rest % facts.tp:
        return f"leaves {rest} GPUs, which replicas of {facts.tp} GPUs do not fill"
    if trainer_gpus % facts.nnodes and trainer_gpus % facts.gpus_per_node:
        return f"must be the same number on each of {facts.nnodes} nodes, or whole nodes of {facts.gpus_per_node}"
    if facts.mini_batch * facts.samples % trainer_gpus:
        return f"must divide the {facts.mini_batch * facts.samples} samples of a mini batch"
    return None
