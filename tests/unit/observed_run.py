"""Writes the folder that a watched run leaves, from figures that a reader can add up in the head."""

from __future__ import annotations

import json
from pathlib import Path


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("leases", "steps", "host", "metrics"):
            self.append(f"{name}.jsonl")
        (path / "rollouts").mkdir()

    def append(self, name: str, *lines: dict) -> RunFolder:
        with (self.path / name).open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        return self

    def lease(self, name: str, num_gpus: int, granted_s: float, released_s: float | None) -> RunFolder:
        role = "replica" if "/replica/" in name else "trainer"
        self.append(
            "leases.jsonl", {"event": "granted", "lease": name, "role": role, "num_gpus": num_gpus, "t": granted_s}
        )
        if released_s is not None:
            self.append("leases.jsonl", {"event": "released", "lease": name, "t": released_s})
        return self

    def step(self, step: int, logged_s: float, /, **timers_s: float) -> RunFolder:
        data = {f"timing_s/{name}": value for name, value in timers_s.items()}
        data |= {
            "critic/score/mean": step / 10,
            "training/rollout_probs_diff_max": 1e-8 * step,
            "training/rollout_probs_diff_mean": 1e-9 * step,
            "response_length/mean": 12.5,
        }
        self.append("metrics.jsonl", {"step": step, "data": data})
        return self.append("steps.jsonl", {"step": step, "t": logged_s})

    def samples(self, step: int, *keys: str) -> RunFolder:
        return self.append(f"rollouts/{step}.jsonl", *({"uid": key, "step": step, "score": 1.0} for key in keys))

    def lengths(
        self, step: int, rows: dict[int, list[int]], bounds: tuple[int, int, bool] = (64, 2, False)
    ) -> RunFolder:
        """Samples of a step: the response tokens of each row's sessions; a row's prompt is always the same."""
        if not (self.path / "samples-1-a.jsonl").exists():
            self.append(
                "samples-1-a.jsonl", dict(zip(("max_response_tokens", "n", "is_replayed"), bounds, strict=True))
            )
        for row, tokens in rows.items():
            for session, count in enumerate(tokens):
                sample = {"step": step, "uid": f"u{step}-{row}", "prompt": f"p{row}", "row": row, "session": session}
                self.append("samples-1-a.jsonl", {**sample, "prompt_tokens": 9, "turns": [count]})
        return self

    def engine(self, pid: int, lease: str | None, rank: int | None, *records: tuple, tp: int = 1) -> RunFolder:
        header = {"event": "engine", "pid": pid, "lease": lease, "replica_rank": rank, "tp": tp, "t": records[0][0]}
        self.append(f"engine-{pid}.jsonl", header)
        for record in records:
            if len(record) == 1:
                self.append(f"engine-{pid}.jsonl", {"event": "loaded", "t": record[0]})
            else:
                busy = {"event": "busy", "start_s": record[0], "end_s": record[1]}
                self.append(f"engine-{pid}.jsonl", busy)
        return self

    def host(self, *times: float) -> RunFolder:
        return self.append(
            "host.jsonl",
            *(
                {"t": t, "cpu_percent": 50.0, "memory_peak_bytes": 2**30, "observer_cpu_s": (t - times[0]) / 100}
                for t in times
            ),
        )


def stock_run(path: Path) -> RunFolder:
    """4 GPUs from 100 to 160, two hybrid engines, steps of 10 s from 109 and 120 on, and 1 s of logging after each."""
    run = RunFolder(path).lease("global_poolverl_group_4:0", 4, 100.0, 160.0).host(95.0, 130.0, 165.0)
    timers_s = {"step": 10, "gen": 4, "old_log_prob": 1, "adv": 0.5, "update_actor": 2, "update_weights": 1}
    run.step(1, 120.0, **timers_s).step(2, 131.0, **timers_s)
    run.engine(11, None, 0, (105.0,), (109.5, 112.0), (120.5, 123.0))
    run.engine(12, None, 1, (105.0,), (109.5, 113.0), (120.5, 124.0))
    for step in (1, 2):
        run.samples(step, "g1_0_0", "g1_1_0", "g2_0_0", "g2_1_0")
    return run


def elastic_run(path: Path) -> RunFolder:
    """2 trainer GPUs from 100 to 160; one replica in step 1, two in step 2, each on a lease of its own."""
    run = RunFolder(path).lease("rlhfless/trainer/global_pool", 2, 100.0, 160.0).host(95.0, 165.0)
    timers_s = {"step": 10, "gen": 2, "rlhfless_start": 4, "old_log_prob": 1, "update_actor": 2, "update_weights": 1}
    run.step(1, 120.0, **timers_s).step(2, 131.0, **timers_s)
    events = [{"event": "published", "t": 108.5, "version": 0, "checksum": "c0"}]
    for rank, (granted_s, version) in enumerate([(109.5, 0), (120.5, 1), (120.5, 1)]):
        lease = f"rlhfless/replica/r{rank}"
        run.lease(lease, 1, granted_s, granted_s + 5.5)
        run.engine(20 + rank, lease, rank, (granted_s + 2,), (granted_s + 3.5, granted_s + 5))
        pulled = {"event": "pulled", "t": granted_s + 3, "lease": lease, "version": version, "checksum": f"c{version}"}
        events += [pulled, {"event": "replica_ready", "t": granted_s + 3.5, "lease": lease}]
    events += [{"event": "published", "t": 118.9, "version": 1, "checksum": "c1"}]
    run.append("events-1.jsonl", *events)
    for step in (1, 2):
        run.samples(step, "g1_0_0", "g1_1_0", "g2_0_0", "g2_1_0")
    return run
