"""CUDA kernels, and the plain torch that says what they must compute."""
