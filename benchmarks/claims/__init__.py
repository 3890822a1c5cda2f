"""The papers' claims, examined side by side at a scale that runs here.

    python -m benchmarks.claims [--only NAME] [--preset quick|cpu|gpu] --out DIR

One module a claim (:data:`claims.registry.CLAIMS`), one configuration object
(:class:`claims.presets.Preset`). Every method has the same backbone, data, number of gradient steps
and moving average; what differs is the method's own preconditioning, levels and loss
(:mod:`claims.methods`).
"""
