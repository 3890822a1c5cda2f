"""The operators of torch.library, the same for all backends: schema, shapes, gradients, transforms.

Samples are rows (B, N), and levels are float64. :mod:`pfgm.functional` brings arguments into this
form. It calls :mod:`pfgm.ops.eager`, which leaves the operators out where nothing needs them.
"""
