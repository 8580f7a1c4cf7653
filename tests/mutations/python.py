"""Mutants of the Python: (file, what stands there once, what stands there instead, the tests that notice).

A fifth text says why nothing can notice it.
"""

MUTANTS = [
    ("anl_kernels/suggest.py", "** share, beta_low", "* share, beta_low", "tests/test_suggest.py"),
]
