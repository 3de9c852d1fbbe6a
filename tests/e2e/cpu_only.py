"""verl on a CPU and nothing else of ours, for runs that must not know the plugin.

Loaded through ``VERL_USE_EXTERNAL_MODULES``.
"""

from verl_rlhfless.live import cpu

cpu.register()
