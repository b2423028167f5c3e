"""Rollout: G responses a prompt, each token with its behaviour log-prob, from one of several engines."""
