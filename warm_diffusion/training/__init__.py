"""Training: state and step, checkpoints, devices, metric writer, stop signals."""
