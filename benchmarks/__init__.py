"""Speed and memory, measured: each module prints its figures and records them under ``results``.

Run them all with ``make bench``.
"""
