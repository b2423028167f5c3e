"""The stages: align, reward, mpo, grpo. Each says what a step's batch is and what its loss is; the loop does the rest."""
