"""Several ranks under torchrun: what they agree on, whose gradient is whose, and how the frozen weights are sharded."""
