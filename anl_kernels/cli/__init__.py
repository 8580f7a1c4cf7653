"""What `python -m anl_kernels` runs: info, check, demo, bench. Nothing here is imported by the library itself."""
