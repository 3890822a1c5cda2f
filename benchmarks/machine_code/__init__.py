"""Times of the GPU kernels, predicted from their machine code. Needs no GPU.

    python -m benchmarks.machine_code

- ``sass``: machine code; ``kernels``: the compiled kernels;
- ``pipeline``: one multiprocessor that runs a piece of machine code;
- ``banks``: bank conflicts; ``accesses``: what the CUDA kernels access, counted on the host;
- ``devices``: rates of graphics cards;
- ``data``: the work of the kernels on real data; ``launches``: the launches for it;
- ``model``: the predicted time of a launch;
- ``published``: the model beside published times; ``host``: time of the host;
- ``sections``, ``results``, ``page``: what is counted, stored and shown;
- ``roofline``: the least time of each kernel, from its operations and bytes.
"""
