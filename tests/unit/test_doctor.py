"""Each finding of ``rlhfless doctor``, on invented machines, and the exit code on this one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from verl_rlhfless import doctor, versions
from verl_rlhfless.doctor import Finding
from verl_rlhfless.versions import REQUIREMENTS, Requirement

GIB = 1024**3
ROOT = Path(__file__).parents[2]


def printed(findings: list[Finding], width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    doctor.render(findings, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda item: item.distribution)
def test_the_installed_stack_is_supported(requirement: Requirement) -> None:
    assert doctor.check_version(requirement).status == "ok"


@pytest.mark.parametrize(
    ("distribution", "found"),
    [("verl", "0.8.0"), ("ray", "2.51.0"), ("hydra-core", "1.3.5"), ("vllm", "0.11.0"), ("vllm", None)],
)
def test_an_unsupported_version_fails_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, distribution: str, found: str | None
) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda _: found)
    (requirement,) = [item for item in REQUIREMENTS if item.distribution == distribution]
    finding = doctor.check_version(requirement)
    assert finding.status == "fail"
    assert (found or "not installed") in finding.detail
    assert finding.action == f"pip install '{distribution}{requirement.supported}'"


def test_a_plugin_policy_that_keeps_us_out_fails() -> None:
    assert doctor.check_policy({}).status == "ok"
    finding = doctor.check_policy({"VERL_USE_EXTERNAL_PLUGINS": "none"})
    assert finding.status == "fail"
    assert "VERL_USE_EXTERNAL_PLUGINS" in finding.action


@pytest.mark.parametrize(
    ("environ", "has_token_file", "status"),
    [
        ({}, False, "ok"),
        ({"RAY_ADDRESS": "127.0.0.1:6379"}, False, "ok"),
        ({"RAY_ADDRESS": "ray://localhost:10001"}, False, "ok"),
        ({"RAY_ADDRESS": "[::1]:6379"}, False, "ok"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, False, "warn"),
        ({"RAY_ADDRESS": "ray://head.example:10001"}, False, "warn"),
        ({"RAY_ADDRESS": "auto"}, False, "warn"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, True, "ok"),
        ({"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_TOKEN": "secret"}, False, "ok"),
        ({"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_MODE": "token"}, False, "ok"),
        ({"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_MODE": "disabled"}, True, "warn"),
    ],
)
def test_an_open_cluster_on_another_address_is_a_warning(
    tmp_path: Path, environ: dict[str, str], has_token_file: bool, status: str
) -> None:
    if has_token_file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret")
    finding = doctor.check_ray_authentication(environ, tmp_path)
    assert finding.status == status
    assert ("RAY_AUTH_MODE=token" in finding.action) == (status == "warn")
    assert "secret" not in finding.detail


def test_no_gpu_is_cpu_mode_and_not_a_failure() -> None:
    assert "CPU mode" in doctor.check_gpus(0).detail
    assert doctor.check_gpus(0).status == "ok"
    assert doctor.check_gpus(4).detail == "4 visible"


def test_flash_attention_is_missed_only_where_it_is_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda _: None)
    assert doctor.check_flash_attention(0).status == "ok"
    finding = doctor.check_flash_attention(8)
    assert finding.status == "warn"
    assert "--no-build-isolation 'flash-attn" in finding.action  # its build imports torch, which isolation hides
    assert "+actor_rollout_ref.model.override_config.attn_implementation=sdpa" in finding.action


@pytest.mark.parametrize(("available_gib", "status"), [(4, "warn"), (20, "ok")])
def test_little_memory_is_a_warning(available_gib: int, status: str) -> None:
    finding = doctor.check_memory(available_gib * GIB, 24 * GIB)
    assert (finding.status, finding.detail) == (status, f"{available_gib}.0 of 24.0 GiB available")


def test_memory_is_what_the_limits_of_a_container_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_bytes", lambda: 2 * GIB)
    found = {finding.name: finding for finding in doctor.diagnose({})}["memory"]
    assert found.status == "warn" and found.detail.startswith("2.0 of ")


def test_less_memory_than_the_recorded_demo_took_is_a_warning() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    peak_bytes = max(arm["host"]["memory_peak_bytes"] for arm in record["arms"].values())
    finding = doctor.check_memory(peak_bytes, 24 * GIB)
    assert finding.status == "warn" and "the demo needs" in finding.action


@pytest.mark.parametrize(("free_bytes", "status"), [(64 * 1024**2, "warn"), (8 * GIB, "ok")])
def test_a_small_shm_is_a_warning(free_bytes: int, status: str) -> None:
    finding = doctor.check_shared_memory(free_bytes, num_gpus=0)
    assert finding.status == status
    assert ("shm" in finding.action) == (status == "warn")


@pytest.mark.parametrize("num_gpus", [1, 8])
def test_a_machine_with_gpus_needs_shared_memory_for_weights_and_for_all_that_load_them(num_gpus: int) -> None:
    finding = doctor.check_shared_memory(8 * GIB, num_gpus)
    assert finding.status == "warn"
    advised = int(finding.action.split("--shm-size=")[1].split("g)")[0]) * GIB
    assert doctor.check_shared_memory(advised, num_gpus).status == "ok"
    assert advised >= 2 * 2 * 7e9 + num_gpus * 256 * 2**20, "two versions of 7B in bfloat16, and a bucket a worker"


def test_a_broken_check_is_a_failure_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Finding:
        raise SystemExit("rlhfless: error: a patch does not fit")

    for name in ("check_plugin", "check_hydra_group", "check_vllm_entry_point"):
        monkeypatch.setattr(doctor, name, broken)
    findings = {finding.name: finding for finding in doctor.diagnose({})}
    assert findings["verl plugin"].status == "fail"
    assert "a patch does not fit" in findings["verl plugin"].detail
    assert findings["ray"].status == "ok"
    assert len(findings) == len(REQUIREMENTS) + 10


def test_the_report_shows_every_finding_with_its_action_and_without_markup() -> None:
    text = printed([Finding("ray", "ok", "2.60.0"), Finding("GPU", "fail", "[red]none[/red]", "Buy [one].")])
    assert "2.60.0" in text
    assert "[red]none[/red]" in text
    assert "fail: GPU: Buy [one]." in text
    assert "1 of 2 checks failed" in text
    assert "ready" in printed([Finding("ray", "warn", "old")])


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_only_a_failure_changes_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, status: doctor.Status, code: int
) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda _: [Finding("x", status, "y")])
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert doctor.run() == code
