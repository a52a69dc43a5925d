"""C++ kernels, compiled once by the system's compiler."""
