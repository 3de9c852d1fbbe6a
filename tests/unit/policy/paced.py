"""A pool whose replicas take 60 ms an iteration, 2 ms a request and 0.1 ms a prompt token, eight requests at once."""

from verl_rlhfless.live.devices import PoolBounds, declared_pool
from verl_rlhfless.live.pacing import PaceModel
from verl_rlhfless.policy.perf import EngineLimits

POOL = declared_pool(PoolBounds((1,), 4, 4, EngineLimits(8, 8192), 10**6), PaceModel(60.0, 2.0, 0.1))
