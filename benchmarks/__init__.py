"""Speed and memory, measured: each module prints its figures and records them under ``results``.

``make bench`` runs those that need nothing but this host.
"""
