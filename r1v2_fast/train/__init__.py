"""The lean loop: config, rollout, stages, checkpoints, log, evaluation."""
