"""Files, devices, processes and the console: what a program needs of its machine."""
