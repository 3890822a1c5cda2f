"""What the GPU kernels compile to, read from their machine code."""
