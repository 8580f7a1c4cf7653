"""Accuracy under label noise, with this package's own losses: `python -m benchmarks.noisy_labels --help`."""
