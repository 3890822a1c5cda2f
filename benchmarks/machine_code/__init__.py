"""The time of the GPU kernels, counted from their machine code: no GPU is needed.

    python -m benchmarks.machine_code

One module a subject: the machine code (:mod:`machine_code.sass`), one multiprocessor that runs a
stretch of it (:mod:`machine_code.pipeline`), bank conflicts (:mod:`machine_code.banks`), devices
(:mod:`machine_code.devices`), what real data make the kernels do (:mod:`machine_code.data`), what
is launched (:mod:`machine_code.launches`), and of all that the predicted time
(:mod:`machine_code.model`). Nothing here is measured on a GPU: every time is predicted.
"""
