"""The Lightning plugin: the `LearnedOptimizer` callback, strategies by name, and `StabilityMonitor`."""
