"""Training: data, objectives, sharding, the step and the loop around it."""
