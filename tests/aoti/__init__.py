"""Packages: AOTInductor with FP8 attention."""
