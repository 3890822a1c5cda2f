"""Doors to other libraries: each module is one of them, and imports it when it is asked for."""
