"""Features, distances between sets of images, and the weights that they need."""
