"""What one GPU really does with a model's shape: measured with random weights, compared with the shipped model.

Nothing is downloaded: a model is the ``config.json`` that the kit writes. ``python -m benchmarks.gpu --help``.
"""
