"""Tests of the project's own kernels.

Without a GPU they need Triton installed and ``TRITON_INTERPRET=1`` in the environment.
"""
