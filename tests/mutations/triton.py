"""Mutants of the Triton kernels and their launchers, as those of python.py."""

MUTANTS = []
