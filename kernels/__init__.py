"""Triton kernels of pfgm, one file an operation; installed as ``pfgm.kernels``."""
