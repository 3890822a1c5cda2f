"""Adapters to other libraries, one module for each; a module is imported only on request."""
