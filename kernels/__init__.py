"""Triton kernels of pfgm, one file per operation; installed as ``pfgm.kernels``."""
