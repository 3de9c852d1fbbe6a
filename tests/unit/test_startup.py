"""The start-up check: what it refuses, in the user's words, and what it says when a run may start."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from verl_rlhfless import versions
from verl_rlhfless.config import parse_config
from verl_rlhfless.errors import LeaseLostError, RlhflessError, UnsupportedError
from verl_rlhfless.live import recipe_check, startup, suspendable
from verl_rlhfless.live.seams import Seam, check_seams
from verl_rlhfless.live.startup import StartupCheck, check_run
from verl_rlhfless.live.suspendable import why_lease_is_kept

Compose = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Compose:
    """Return ``compose(*overrides)``: verl's recipe with what every run has to set."""
    data = tmp_path_factory.mktemp("data") / "train.jsonl"
    data.write_text("{}\n")
    needed = [
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "trainer.n_gpus_per_node=2",
        f"data.train_files={data}",
        f"data.val_files=[{data}]",
    ]

    def compose_run(*overrides: str) -> DictConfig:
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose("ppo_trainer", overrides=[*needed, *overrides], return_hydra_config=True)

    return compose_run


REFUSED = [
    # overrides, environment, what the message must hold
    (
        ["trainer.v1.trainer_mode=sync"],
        {},
        ["trainer.v1.trainer_mode='sync'", "override 'trainer.v1.trainer_mode=sync'"],
    ),
    (["rlhfless/fusion=on", "algorithm.filter_groups.enable=True"], {}, ["filter_groups.enable=True", "fusion=off"]),
    (
        ["rlhfless/fusion=on", "trainer.v1.sampler.custom_sampler.name=Mine"],
        {},
        ["custom_sampler.name='Mine'", "rlhfless/fusion=off"],
    ),
    (
        ["rlhfless/fusion=on", "algorithm.adv_estimator=grpo", "algorithm.rollout_correction.bypass_mode=True"],
        {},
        ["bypass_mode=True", "nothing to infer"],
    ),
    (["rlhfless/pool=off"], {}, ["rlhfless.pool.name='off'", "only together"]),
    (["rlhfless.planner.name=magic"], {}, ["rlhfless.planner.name='magic'", "off, fixed"]),
    (["rlhfless.planner.schedule=[1,0]"], {}, ["rlhfless.planner.schedule=[1, 0]", "integer >= 1", "[1,2,1,2]"]),
    (["rlhfless.planner.schedule=[1,1.5]"], {}, ["rlhfless.planner.schedule=[1, 1.5]", "integer >= 1"]),
    (["rlhfless.instrument.pace=missing.json"], {}, ["rlhfless.instrument.pace='missing.json'"]),
    (["rlhfless.replay.trace=a.jsonl"], {"RAY_ADDRESS": "host:1"}, ["rlhfless.replay.trace='a.jsonl'", "absolute"]),
    (
        ["rlhfless.pool.park=always", "+actor_rollout_ref.rollout.enable_sleep_mode=False"],
        {},
        ["rlhfless.pool.park='always'", "enable_sleep_mode=True"],
    ),
    (["actor_rollout_ref.model.lora_rank=8"], {}, ["actor_rollout_ref.model.lora_rank=8", "lora.merge=True"]),
    (["trainer.use_v1=False"], {}, ["trainer.use_v1=False", "v0", "trainer.use_v1=True"]),
    (["actor_rollout_ref.rollout.name=sglang"], {}, ["actor_rollout_ref.rollout.name='sglang'", "vllm"]),
    (["actor_rollout_ref.rollout.name=trtllm"], {}, ["actor_rollout_ref.rollout.name='trtllm'", "vllm"]),
    (["actor_rollout_ref.rollout.disaggregation.enabled=True"], {}, ["disaggregation.enabled=True", "not supported"]),
    (["model_engine=veomni"], {}, ["actor_rollout_ref.actor.strategy='veomni'", "fsdp, fsdp2, megatron"]),
    (["actor_rollout_ref.rollout.data_parallel_size=2"], {}, ["data_parallel_size=2", "tensors only"]),
    (
        ["actor_rollout_ref.rollout.expert_parallel_size=2"],
        {},
        ["expert_parallel_size=2", "plans choose the size", "rlhfless/planner=fixed"],
    ),
    (
        [
            "rlhfless/planner=fixed",
            "rlhfless.pool.max_gpus=4",
            "rlhfless.planner.schedule=[1,3]",
            "rlhfless.pool.suspend_trainer=never",
        ],
        {},
        ["rlhfless.pool.max_gpus=4", "trainer's 2 GPUs", "3 replicas of 1 GPUs", "need 5", "suspend_trainer=never"],
    ),
    (
        ["rlhfless/planner=fixed", "rlhfless.planner.schedule=[5]", "+ray_kwargs.ray_init.num_gpus=4"],
        {},
        ["ray_kwargs.ray_init.num_gpus=4", "need 5"],
    ),
    (
        [
            "reward.reward_model.enable=True",
            "reward.reward_model.enable_resource_pool=True",
            "reward.reward_model.n_gpus_per_node=3",
            "reward.reward_model.nnodes=1",
            "+ray_kwargs.ray_init.num_gpus=4",
        ],
        {},
        ["ray_kwargs.ray_init.num_gpus=4", "need 2, and reward.reward_model holds 3", "Raise it to 5"],
    ),
    (
        [
            "rlhfless.pool.suspend_trainer=never",
            "rlhfless.planner.min_replicas=3",
            "rlhfless.pool.max_gpus=4",
        ],
        {},
        ["rlhfless.pool.max_gpus=4", "smallest planned fleet, 3 replicas", "need 5", "rlhfless.planner.min_replicas"],
    ),
    (
        ["rlhfless/planner=cost_aware", "rlhfless.planner.max_usd_per_step=1"],
        {},
        ["rlhfless.planner.max_usd_per_step=1.0", "rlhfless.planner.usd_per_gpu_hour=PRICE"],
    ),
    (
        ["reward.reward_model.enable=True"],
        {},
        ["reward_model.enable_resource_pool=False", "colocated reward model", "+rlhfless=resident"],
    ),
    (["data.train_files=/nowhere/train.parquet"], {}, ["data.train_files='/nowhere/train.parquet'", "missing"]),
    ([], {"VERL_USE_EXTERNAL_PLUGINS": "none"}, ["VERL_USE_EXTERNAL_PLUGINS='none'", "configured but not active"]),
    ([], {"VERL_USE_EXTERNAL_PLUGINS": "a,b"}, ["VERL_USE_EXTERNAL_PLUGINS='a,b'", "configured but not active"]),
]


ROLLOUT = "actor_rollout_ref.rollout"
RESIDENT_REFUSED = [
    (["trainer.v1.trainer_mode=sync"], ["trainer.v1.trainer_mode='sync'", "rlhfless.pool.name=resident"]),
    (["trainer.use_v1=False"], ["trainer.use_v1=False", "v0"]),
    ([f"{ROLLOUT}.name=sglang"], [f"{ROLLOUT}.name='sglang'", "vllm"]),
    ([f"{ROLLOUT}.router_config_path=mine.yaml"], [f"{ROLLOUT}.router_config_path='mine.yaml'", "one of each"]),
    (
        [f"+{ROLLOUT}.agent.agent_loop_manager_class=my.Manager"],
        [f"{ROLLOUT}.agent.agent_loop_manager_class='my.Manager'", "one of each"],
    ),
    ([f"{ROLLOUT}.full_determinism=True"], ["full_determinism=True", "rlhfless/dispatcher=stock"]),
    (["rlhfless/weights=store"], ["rlhfless.weights.name='store'", "verl's own replicas"]),
    (["skip.rollout_tq.enable=True"], ["skip.rollout_tq.enable=True", "counts those that it asked for"]),
    (["actor_rollout_ref.hybrid_engine=False"], ["hybrid_engine=False", "separate_async"]),
    ([f"{ROLLOUT}.data_parallel_size=2"], [f"{ROLLOUT}.data_parallel_size=2", "tensors only"]),
    ([f"{ROLLOUT}.tensor_model_parallel_size=4"], ["tensor_model_parallel_size=4", "a node has 2 GPUs"]),
    ([f"{ROLLOUT}.enable_prefix_caching=False"], ["enable_prefix_caching=False", "rlhfless/prefix_dedup=off"]),
    (
        [f"+{ROLLOUT}.engine_kwargs.vllm.max_num_seqs=8"],
        ["engine_kwargs.vllm.max_num_seqs=8", f"Set {ROLLOUT}.max_num_seqs instead"],
    ),
    (
        [f"+{ROLLOUT}.engine_kwargs.vllm.gpu_memory_utilization=0.9"],
        ["engine_kwargs.vllm.gpu_memory_utilization=0.9", f"Set {ROLLOUT}.gpu_memory_utilization instead"],
    ),
    (
        [f"+{ROLLOUT}.engine_kwargs.vllm.enable_prefix_caching=False"],
        ["engine_kwargs.vllm.enable_prefix_caching=False", f"Set {ROLLOUT}.enable_prefix_caching instead"],
    ),
    (
        [f"+{ROLLOUT}.engine_kwargs.vllm.distributed_executor_backend=ray"],
        ["engine_kwargs.vllm.distributed_executor_backend='ray'", "Remove it"],
    ),
    (["actor_rollout_ref.model.lora_adapter_path=/a"], ["lora_adapter_path='/a'", "would train the whole model"]),
    (["reward_model.reward_manager=dapo"], ["reward_model.reward_manager='dapo'", "Set reward.reward_manager.name"]),
    (["reward_model.model.path=/rm"], ["reward_model.model.path='/rm'", "Set reward.reward_model.model_path"]),
    (["custom_reward_function.path=r.py"], ["custom_reward_function.path='r.py'", "Set reward.custom_reward_function"]),
    (["algorithm.adv_estimator=remax"], ["algorithm.adv_estimator='remax'", "with or without this plugin"]),
    (["algorithm.adv_estimator=optimal_token_baseline"], ["optimal_token_baseline", "v1 trainer never gives"]),
    (["rlhfless.prefix_dedup.training=prefix_grouper"], ["prefix_dedup.training='prefix_grouper'", "v1 trainer"]),
    (["rlhfless/predictor=oracle"], ["rlhfless.predictor.name='oracle'", "rlhfless.replay.trace"]),
]


@pytest.mark.parametrize(("overrides", "parts"), RESIDENT_REFUSED, ids=lambda value: str(value)[:60])
def test_a_resident_run_that_cannot_work_is_refused(recipe: Compose, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(RlhflessError) as caught:
        check_run(recipe("+rlhfless=resident", *overrides), {})
    for part in parts:
        assert part in str(caught.value)


def test_a_resident_run_says_what_is_active_and_needs_no_budget(recipe: Compose) -> None:
    line = check_run(recipe("+rlhfless=resident", "actor_rollout_ref.model.lora_rank=8"), {})
    parts = "pool=resident predictor=history dispatcher=length_bucket prefix_dedup=on migration=cut_and_migrate"
    assert line.startswith(f"active: {parts} (verl 0.9.")


def test_full_determinism_goes_with_a_placement_that_is_fixed(recipe: Compose) -> None:
    fixed = ["rlhfless/dispatcher=stock", "rlhfless/migration=off", f"{ROLLOUT}.full_determinism=True"]
    assert check_run(recipe("+rlhfless=resident", *fixed), {}).startswith("active:")


@pytest.mark.parametrize(("overrides", "environ", "parts"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_before_anything_starts(
    recipe: Compose, overrides: list[str], environ: Mapping[str, str], parts: list[str]
) -> None:
    with pytest.raises(RlhflessError) as caught:
        check_run(recipe("+rlhfless=default", *overrides), environ)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("trainer", "sizes", "part"),
    [
        ("never", "[1,3]", "3 must be at most 2 GPUs and divide the model's 4 heads"),
        ("never", "[4]", "4 must be at most 2 GPUs"),
        ("auto", "[8]", "8 must be at most 4 GPUs"),
    ],
)
def test_a_tensor_parallel_size_that_the_model_cannot_have_is_refused_before_ray_starts(
    recipe: Compose, tmp_path: Path, trainer: str, sizes: str, part: str
) -> None:
    overrides = [*_sized(tmp_path), f"rlhfless.pool.suspend_trainer={trainer}"]
    check_run(recipe("+rlhfless=default", *overrides), {})
    with pytest.raises(RlhflessError, match=re.escape(part)):
        check_run(recipe("+rlhfless=default", *overrides, f"rlhfless.planner.tensor_parallel_sizes={sizes}"), {})


def test_a_replica_may_be_as_large_as_the_budget_when_the_trainer_leaves(recipe: Compose, tmp_path: Path) -> None:
    check_run(recipe("+rlhfless=default", *_sized(tmp_path), "rlhfless.planner.tensor_parallel_sizes=[4]"), {})


@pytest.mark.parametrize("is_downloaded", [False, True])
@pytest.mark.parametrize(
    ("group", "switches"),
    [("default", ["rlhfless/planner=fixed", "rlhfless/dispatcher=stock", "rlhfless/migration=off"]),
     ("resident", ["rlhfless/dispatcher=stock", "rlhfless/migration=off"])],
)  # fmt: skip
def test_a_model_without_a_price_is_refused_with_the_switches_that_make_it_run(
    recipe: Compose,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    group: str,
    switches: list[str],
    is_downloaded: bool,
) -> None:
    _sized(tmp_path, kv_lora_rank=8)
    name = "some/model" if is_downloaded else str(tmp_path)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
    latent = [f"+rlhfless={group}", f"actor_rollout_ref.model.path={name}"]
    with pytest.raises(RlhflessError) as caught:
        check_run(recipe(*latent), {})
    for part in (f"actor_rollout_ref.model.path={name!r}", "multi-head latent attention", *switches):
        assert part in str(caught.value)
    assert check_run(recipe(*latent, *switches), {}).startswith("active:")


def test_a_file_that_leaves_out_what_its_model_type_has_by_default_is_left_to_the_set_up(
    recipe: Compose, tmp_path: Path
) -> None:
    sizes = {"model_type": "gemma3n_text", "hidden_size": 2560, "num_hidden_layers": 34}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": sizes}))
    assert check_run(recipe("+rlhfless=default", f"actor_rollout_ref.model.path={tmp_path}"), {}).startswith("active:")


def test_latent_attention_has_a_price(recipe: Compose, tmp_path: Path) -> None:
    widths = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    _sized(tmp_path, model_type="deepseek_v3", **widths)
    assert check_run(recipe("+rlhfless=default", f"actor_rollout_ref.model.path={tmp_path}"), {}).startswith("active:")


def test_sizes_must_divide_the_heads_of_states(recipe: Compose, tmp_path: Path) -> None:
    _sized(
        tmp_path, linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_conv_kernel_dim=4, full_attention_interval=2,
    )  # fmt: skip
    sizes = ["rlhfless.pool.max_gpus=4", f"actor_rollout_ref.model.path={tmp_path}"]
    with pytest.raises(RlhflessError, match=r"divide the model's 4 heads, 1 and 2 heads of its layers with states and"):
        check_run(recipe("+rlhfless=default", "rlhfless.planner.tensor_parallel_sizes=[2]", *sizes), {})


def _sized(tmp_path: Path, **more: int | str) -> list[str]:
    """Return the overrides of a run on four GPUs, two of them the trainer's, with a model of four heads."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "num_hidden_layers": 2}
    config = {**sizes, "intermediate_size": 128, "vocab_size": 99, **more}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return ["rlhfless/planner=cost_aware", "rlhfless.pool.max_gpus=4", f"actor_rollout_ref.model.path={tmp_path}"]


def test_an_elastic_run_says_what_is_active(recipe: Compose) -> None:
    limits = ["rlhfless.pool.max_gpus=4", "+ray_kwargs.ray_init.num_gpus=4"]
    overrides = ["rlhfless/planner=fixed", "rlhfless.planner.schedule=[1,2]", *limits]
    line = check_run(recipe("+rlhfless=default", *overrides), {"VERL_USE_EXTERNAL_PLUGINS": "other, rlhfless"})
    assert line.startswith("active: pool=elastic weights=store planner=fixed predictor=history ")
    assert "migration=cut_and_migrate fusion=on schedule=[1, 2] (verl 0.9." in line
    for distribution in ("vllm", "ray", "hydra-core"):
        assert f"{distribution} {versions.installed_version(distribution)}" in line


def test_a_data_set_of_the_recipes_own_names_its_files_as_it_likes(recipe: Compose) -> None:
    own = ["data.custom_cls.path=mine.py", "data.custom_cls.name=Mine", "data.train_files=hub/name"]
    assert check_run(recipe("+rlhfless=default", *own), {}).startswith("active:")


@pytest.mark.parametrize(
    ("override", "why"),
    [
        (f"{ROLLOUT}.prometheus.enable=True", "Prometheus is told of none"),
        (f"{ROLLOUT}.free_cache_engine=False", "sleeps or ends between two rollouts"),
        (f"{ROLLOUT}.checkpoint_engine.backend=nccl", "the store of rlhfless.weights"),
        ("actor_rollout_ref.actor.profiler.enable=True", "elastic replicas are not profiled"),
    ],
)
def test_an_option_without_effect_is_told_where_replicas_are_leased(
    recipe: Compose, monkeypatch: pytest.MonkeyPatch, override: str, why: str
) -> None:
    told: list[str] = []
    monkeypatch.setattr(recipe_check.logger, "warning", lambda text, *values: told.append(text % values))
    check_run(recipe("+rlhfless=resident", override), {})
    assert not told
    check_run(recipe("+rlhfless=default", override), {})
    (text,) = told
    assert "has no effect" in text and why in text


def test_a_program_with_a_trainer_of_its_own_is_refused(recipe: Compose) -> None:
    from verl.experimental.one_step_off_policy.main_ppo import main as other
    from verl.trainer.main_ppo import main

    config = recipe("+rlhfless=default")
    assert check_run(config, {}, inspect.unwrap(main)).startswith("active:")
    with pytest.raises(UnsupportedError, match=r"one_step_off_policy\.main_ppo: has a trainer of its own"):
        check_run(config, {}, inspect.unwrap(other))
    off = recipe("+rlhfless=off")
    assert check_run(off, {}, inspect.unwrap(other)) == "all plugins are off: stock verl"


def test_a_cluster_of_another_host_is_not_measured_against_the_local_declaration(recipe: Compose) -> None:
    config = recipe("+rlhfless=default", "rlhfless.planner.schedule=[3]", "+ray_kwargs.ray_init.num_gpus=4")
    assert check_run(config, {"RAY_ADDRESS": "10.0.0.1:6379"}).startswith("active:")


def test_all_off_is_stock_and_needs_nothing_of_us(recipe: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda _: None)
    config = recipe("+rlhfless=off", "actor_rollout_ref.rollout.name=sglang", "data.train_files=/nowhere")
    assert check_run(config, {"VERL_USE_EXTERNAL_PLUGINS": "none"}) == "all plugins are off: stock verl"


def test_our_mode_without_a_pool_of_ours_is_refused(recipe: Compose) -> None:
    with pytest.raises(RlhflessError, match=r"trainer_mode='rlhfless_sync': needs our rollout"):
        check_run(recipe("+rlhfless=off", "trainer.v1.trainer_mode=rlhfless_sync"), {})


def test_a_missing_replay_trace_is_refused_in_the_stock_arm_too(recipe: Compose) -> None:
    with pytest.raises(RlhflessError, match=r"lengths\.jsonl"):
        check_run(recipe("+rlhfless=off", "rlhfless.replay.trace=/nowhere/lengths.jsonl", "data.shuffle=False"), {})


def test_an_empty_data_file_is_named(recipe: Compose, tmp_path: Path) -> None:
    empty = tmp_path / "empty.parquet"
    empty.touch()
    with pytest.raises(RlhflessError, match=r"data\.val_files=.*empty\.parquet.* is empty"):
        check_run(recipe("+rlhfless=default", f"data.val_files={empty}"), {})


@pytest.mark.parametrize(
    ("distribution", "found", "text"),
    [
        ("verl", "0.8.0", "verl=0.8.0: outside the supported range >=0.9.1,<0.10"),
        ("verl", "0.10.1", "verl=0.10.1"),
        ("verl", None, "verl is not installed"),
        ("vllm", "0.18.0", "vllm=0.18.0"),
        ("ray", "2.51.0", "ray=2.51.0"),
        ("hydra-core", "1.3.5", "hydra-core=1.3.5"),
    ],
)
def test_versions_outside_the_range_are_refused(
    recipe: Compose, monkeypatch: pytest.MonkeyPatch, distribution: str, found: str | None, text: str
) -> None:
    real = versions.installed_version
    monkeypatch.setattr(versions, "installed_version", lambda name: found if name == distribution else real(name))
    with pytest.raises(UnsupportedError) as caught:
        check_run(recipe("+rlhfless=default"), {})
    assert text in str(caught.value)
    assert "pip install" in str(caught.value)


def test_the_ranges_agree_with_the_project_file() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    for item in versions.REQUIREMENTS:
        if item.distribution != "vllm":  # chosen by verl[vllm]
            extra = "[vllm]" if item.distribution == "verl" else ""
            assert f"{item.distribution}{extra}{item.supported}" in declared


def test_an_unregistered_entry_point_is_an_error(recipe: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "entry_points", lambda **_: ())
    with pytest.raises(UnsupportedError, match="configured but not active"):
        check_run(recipe("+rlhfless=default"), {})


def test_every_missing_name_of_verl_is_reported_at_once() -> None:
    missing = Seam("verl.trainer.ppo.v1.trainer_base", "PPOTrainer.no_such_hook")
    changed = Seam("verl.trainer.ppo.v1.trainer_base", "register_trainer", ("name", "priority"))
    absent = Seam("verl.no_such_module", "anything")
    with pytest.raises(UnsupportedError) as caught:
        check_seams((missing, changed, absent))
    for part in ("no_such_hook", "has no parameter priority", "verl.no_such_module", "verl=0.9."):
        assert part in str(caught.value)


@pytest.mark.parametrize("broken", [RlhflessError("a.b=1: is\nwrong. Fix it."), KeyError("surprise")])
def test_any_failure_ends_the_process_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: Exception
) -> None:
    def fail(*_: object) -> str:
        raise broken

    monkeypatch.setattr(startup, "check_run", fail)
    with pytest.raises(SystemExit) as caught:
        StartupCheck().on_job_start(DictConfig({}))
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("rlhfless: error: ")
    assert captured.err.count("\n") == 1


class _Cause(LeaseLostError):
    """As Ray raises it in another process: its own text is a traceback, the cause is ours."""

    cause = LeaseLostError("lease a: not granted.\nThe state after step 3 is in /out.")


@pytest.mark.parametrize("error", [_Cause("a traceback"), _Cause.cause])
def test_a_run_that_lost_its_gpus_ends_with_one_line_and_a_code_of_its_own(
    error: LeaseLostError, capsys: pytest.CaptureFixture[str]
) -> None:
    job = JobReturn(status=JobStatus.FAILED)
    job.return_value = error
    with pytest.raises(SystemExit) as ended:
        StartupCheck().on_job_end(DictConfig({}), job_return=job)
    assert ended.value.code == 75
    assert capsys.readouterr().err == ("rlhfless: error: lease a: not granted. The state after step 3 is in /out.\n")


@pytest.mark.parametrize("value", [None, RuntimeError("anything else")])
def test_any_other_end_of_a_run_is_hydras_business(value: object, capsys: pytest.CaptureFixture[str]) -> None:
    job = JobReturn(status=JobStatus.COMPLETED)
    job.return_value = value
    StartupCheck().on_job_end(DictConfig({}), job_return=job)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ((), ""),
        (("rlhfless.pool.suspend_trainer=never",), "rlhfless.pool.suspend_trainer=never"),
        (("actor_rollout_ref.actor.strategy=megatron",), "only FSDP's state"),
        (("critic.enable=True", "critic.strategy=megatron"), "only FSDP's state"),
        (("critic.enable=False", "critic.strategy=megatron"), ""),
    ],
)
def test_what_works_on_the_trainers_gpus_keeps_its_lease(recipe: Compose, overrides: tuple[str, ...], why: str) -> None:
    config = recipe("+rlhfless=default", *overrides)
    reason = why_lease_is_kept(config, config.rlhfless.pool.suspend_trainer)
    assert reason.startswith(why) and bool(reason) == bool(why)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("critic.enable=False",), ["actor_rollout_ref.actor"]),
        (("actor_rollout_ref.actor.strategy=fsdp2", "critic.enable=True"), ["critic"]),
        (("algorithm.adv_estimator=gae",), ["actor_rollout_ref.actor", "critic"]),
        (("actor_rollout_ref.actor.strategy=fsdp2", "critic.enable=False"), []),
        (("rlhfless.pool.suspend_trainer=never",), []),
        (("trainer.device=cpu",), []),
    ],
)
def test_a_run_is_told_once_which_state_is_lost_with_the_trainers_gpus(
    recipe: Compose, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], named: list[str]
) -> None:
    told: list[str] = []
    monkeypatch.setattr(suspendable.logger, "warning", lambda text, *values: told.append(text % values))
    check_run(recipe("+rlhfless=default", *overrides), {})
    assert len(told) == bool(named)
    for text in told:
        assert f"state of {' and '.join(f'{engine}.strategy=fsdp' for engine in named)} can't be saved" in text
        assert f"Set {' and '.join(f'{engine}.strategy=fsdp2' for engine in named)}, or" in text


def test_with_a_trainer_that_leaves_the_replicas_may_use_the_whole_budget(recipe: Compose) -> None:
    budget = ("rlhfless/planner=fixed", "rlhfless.pool.max_gpus=2", "rlhfless.planner.schedule=[2]")
    parsed = parse_config(OmegaConf.to_container(recipe("+rlhfless=default", *budget).rlhfless))
    startup.check_budget(recipe("+rlhfless=default", *budget), parsed, {})


def test_hydra_lets_the_exit_code_through(tmp_path: Path) -> None:
    app = tmp_path / "app.py"
    app.write_text("""
import hydra
from verl_rlhfless.errors import LeaseLostError
from verl_rlhfless.live.startup import StartupCheck

class OnlyTheEnd(StartupCheck):
    def on_job_start(self, config, **_):
        pass

@hydra.main(config_path=None, version_base=None)
def main(config):
    raise LeaseLostError("the trainer's GPUs did not come back")

main()
""")
    overrides = ["+hydra.callbacks.end._target_=__main__.OnlyTheEnd", f"hydra.run.dir={tmp_path}"]
    ended = subprocess.run([sys.executable, "-W", "ignore", str(app), *overrides], capture_output=True, text=True)
    assert ended.returncode == LeaseLostError.EXIT_CODE
    assert ended.stderr == "rlhfless: error: the trainer's GPUs did not come back\n"
