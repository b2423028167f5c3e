"""What tests and benchmarks share: the relative rule, counted FLOPs, counted memory."""
