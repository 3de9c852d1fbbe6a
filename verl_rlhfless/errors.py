"""The one error tree. A message names the key, its value, the broken rule and what to do next."""

from __future__ import annotations


class RlhflessError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(RlhflessError):
    """A configuration value breaks a rule."""

    def __init__(self, key: str, value: object, rule: str, action: str) -> None:
        super().__init__(f"{key}={value!r}: {rule}. {action}")
        self.key, self.value, self.rule, self.action = key, value, rule, action

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str, str]]:
        return type(self), (self.key, self.value, self.rule, self.action)  # survives Ray's pickling


class DataError(RlhflessError):
    """An input file is missing, empty or malformed; the message holds path and line."""


class LeaseTimeoutError(RlhflessError):
    """GPUs were not granted in time; the message names what is missing."""


class LeaseImpossibleError(RlhflessError):
    """What is to be shared out has too few GPUs left, and waiting would not change that."""


class LeaseReleaseError(RlhflessError):
    """GPUs were not given back in time; the message names the lease and its state."""


class DeviceMismatchError(RlhflessError):
    """A lease came back with other devices than the suspended processes are bound to."""


class SuspendError(RlhflessError):
    """Ranks of a worker group could not leave or regain their devices; the message names them."""


class DeviceMemoryError(SuspendError):
    """Ranks held device memory after their state had left; it is back on the device, and the lease is kept."""


class LeaseLostError(RlhflessError):
    """The trainer's GPUs were not leased again in time; the message says where the run goes on from.

    A run that ends with it exits with ``EXIT_CODE`` (EX_TEMPFAIL of sysexits.h: try again later).
    """

    EXIT_CODE = 75


class ReplicaError(RlhflessError):
    """A rollout replica failed to start, load, drain or stop."""


class WeightStoreError(RlhflessError):
    """A weight version is missing, stale, or does not fit into host memory."""


class HostMemoryError(RlhflessError):
    """A node lacks host memory for what the run puts on it; the message names the shortage and the holders."""


class SampleLossError(RlhflessError):
    """A training batch holds fewer samples than prompts x n."""


class UnsupportedError(RlhflessError):
    """A combination that this package refuses by name (version, backend, trainer)."""


def why(error: Exception) -> str:
    """Return the reason of an error in words: of an ``OSError`` without its number and its file."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
