"""Property tests are never judged by the clock: on a busy machine one example may take long."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
