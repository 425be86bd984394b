"""Kernels in Triton: nothing to install beyond a torch with CUDA, which brings its Triton.

The modules that end in ``_kernel`` import Triton; nothing imports those before a kernel is run.
"""
