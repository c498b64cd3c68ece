"""Training: state and step, checkpoints, devices, metric writer, stop signals."""

WRITERS = ("tensorboard", "wandb")  # that training.writers names
