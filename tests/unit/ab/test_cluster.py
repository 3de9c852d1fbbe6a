"""What a running cluster's processes get arrives as it was; an address at which none runs is refused at once."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from verl_rlhfless.ab.cluster import (
    _can_write,
    _inherited,
    _travels,
    check_address,
    marked,
    private_cluster,
    running_cluster,
)
from verl_rlhfless.errors import ConfigError, RlhflessError


@given(value=st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1))
def test_any_value_survives_hydras_grammar(value: str) -> None:
    override = OverridesParser.create().parse_override(_inherited("NAME", value))
    assert override.key_or_group == "ray_kwargs.ray_init.runtime_env.env_vars.NAME"
    assert override.is_force_add() and override.value() == value


def test_a_running_cluster_gives_workers_their_devices_and_configurations_keep_their_syntax() -> None:
    assert _travels("NCCL_DEBUG", "INFO, $HOME") and _travels("EMPTY", "")
    assert not any(
        _travels(name, value) for name, value in [("CUDA_VISIBLE_DEVICES", "0"), ("PS1", "${x}"), ("A", "a\nb")]
    )


def test_the_address_of_a_client_is_refused() -> None:
    with pytest.raises(ConfigError, match="RAY_ADDRESS='ray://head:10001': is the address of a Ray client"):
        check_address("ray://head:10001")


def test_an_address_at_which_something_listens_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_address(f"127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "127.0.0.1", "127.0.0.1:", ":6379", "head:word", "[::1:6379"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="must be auto, or HOST:PORT"):
        check_address(address)


def test_where_nothing_listens_neither_the_check_nor_an_arm_waits_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was asked"))
    free = free_address()
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS='{free}': nothing answers there"):
        check_address(free)
    with pytest.raises(ConfigError, match="nothing answers there"), running_cluster(free, 1, {}):
        pass


def test_a_host_that_does_not_answer_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("verl_rlhfless.ab.cluster._CONNECT_TIMEOUT_S", 0.1)
        address = server.getsockname()
        waiting = [socket.socket() for _ in range(4)]  # fill the queue of a server that accepts nobody
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        with pytest.raises(ConfigError, match="timed out"):
            check_address(f"127.0.0.1:{address[1]}")
        for one in waiting:
            one.close()


def test_auto_is_the_cluster_that_ray_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    where = "ray._private.services.canonicalize_bootstrap_address"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(where, lambda _: address)
        check_address("auto")
    with pytest.raises(ConfigError, match="RAY_ADDRESS='auto': nothing answers at 127"):
        check_address("auto")

    def none(_: str) -> str:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(where, none)
    with pytest.raises(ConfigError, match="RAY_ADDRESS='auto': no Ray cluster runs on this host"):
        check_address("auto")


def free_address() -> str:
    """Return an address of this host at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_rays_sockets_can_be_named_however_long_the_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = "/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
    for root in (tmp_path / "of_a_job_of_slurm", Path("/tmp")):
        root.mkdir(exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(root))
        with marked({}) as mark:
            assert len(mark.temp_dir + session) <= 107 and Path(mark.temp_dir).is_dir()


def test_a_private_cluster_that_does_not_start_is_an_error_of_its_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Attempting to start raylet with 8 GPUs, but CUDA_VISIBLE_DEVICES contains ['0'].")

    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(RlhflessError, match="does not start: Attempting to start raylet with 8 GPUs"):  # noqa: SIM117
        with private_cluster(8, {}):
            pass


def test_a_node_that_does_not_see_the_marker_cannot_write_there(tmp_path: Path) -> None:
    (tmp_path / "marker").write_text("")
    assert _can_write(str(tmp_path / "marker")) and not _can_write(str(tmp_path / "other"))
