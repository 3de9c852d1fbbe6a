"""The same questions to verl's class and to ours that takes its place: where they differ, a test says so."""

from tests.integration.conftest import ray_cluster

__all__ = ["ray_cluster"]
