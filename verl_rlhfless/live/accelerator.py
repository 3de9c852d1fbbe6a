"""What a lease has to know about verl's platform. The one place on the driver's side that asks for it."""

from __future__ import annotations

from dataclasses import dataclass

from verl.plugin.platform import get_platform

from verl_rlhfless_patches.ray_leased_devices import leased_devices_env


@dataclass(frozen=True, slots=True)
class Accelerator:
    """Names of one kind of accelerator.

    Attributes:
        resource: Ray's resource, e.g. ``GPU``.
        visible_env: Environment variable that narrows a process to some devices, e.g. ``CUDA_VISIBLE_DEVICES``.
        noset_envs: Variables that keep Ray from setting ``visible_env``.
    """

    resource: str
    visible_env: str
    noset_envs: tuple[str, ...]

    @classmethod
    def of_platform(cls) -> Accelerator:
        """Return the accelerator of verl's current platform."""
        platform = get_platform()
        return cls(platform.ray_resource_name(), platform.visible_devices_envvar(), tuple(platform.ray_noset_envvars()))

    def worker_env(self, device_id: str) -> dict[str, str]:
        """Return the environment of a rank that runs outside its lease's placement group on one leased device."""
        return {
            self.visible_env: device_id,
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray may clear visible_env: the actor has no GPU
            # With NOSET verl takes Ray's device id for a local rank, but this process sees its one device as number 0.
            **dict.fromkeys(self.noset_envs, ""),
            **leased_devices_env(self.resource, (device_id,)),
        }
