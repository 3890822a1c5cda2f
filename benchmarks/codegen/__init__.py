"""What the GPU kernels compile to, read from the machine code. Needs no GPU."""
