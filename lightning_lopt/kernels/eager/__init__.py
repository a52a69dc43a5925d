"""Steps in eager PyTorch on the CPU, for where no C++ kernel can be compiled: far faster than the rule itself."""
