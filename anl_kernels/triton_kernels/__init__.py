"""Every Triton kernel. Nothing here is imported before a call needs it: `import anl_kernels` does without Triton."""
