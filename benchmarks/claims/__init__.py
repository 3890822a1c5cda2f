"""The papers' claims, examined on small data.

    python -m benchmarks.claims [--only NAME] [--preset quick|cpu] --out DIR

Each claim has a module, listed in ``registry.CLAIMS``. All claims read one configuration object,
``presets.Preset``. Every method has the same backbone, data, number of gradient steps and moving
average. Methods differ in preconditioning, levels and loss (``methods``).
"""
