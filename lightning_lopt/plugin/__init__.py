"""The Lightning plugin: the `LearnedOptimizer` callback, strategies that add it by name, and `StabilityMonitor`."""
