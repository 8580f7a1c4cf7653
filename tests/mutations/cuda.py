"""Mutants of the CUDA kernels and their launchers, as those of python.py."""

MUTANTS = []
