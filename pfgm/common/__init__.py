"""Helpers for all other packages: checks, files, messages, tensors and transforms."""
