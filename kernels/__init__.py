"""Triton kernels for merging, importable on their own: `import olmfast.kernels`."""
