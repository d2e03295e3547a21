"""What strategies ask of a device in one launch where torch takes many, as Triton programs, for CUDA."""
