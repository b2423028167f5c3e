"""The R1V2 model family on transformers' InternVL: presets, loading, freezing, the policy and the reward model."""
