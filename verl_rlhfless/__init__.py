"""Elastic, serverless RLHF on verl: a plugin chosen by pip and Hydra overrides alone."""

__version__ = "0.1.0"
