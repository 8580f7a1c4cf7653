"""Mutants of the CPU kernels, as those of python.py."""

MUTANTS = []
