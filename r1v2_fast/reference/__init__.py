"""Each op's definition in plain PyTorch: short, fp64-clean, loops allowed. Everything else is compared with it."""
