"""Patches of third-party code, one small module each: why, where upstream, when to remove, a check that fails loudly.

Importing this package changes nothing; a module changes something when it is asked to.
"""
