"""The machine under a process: cores, ranks, memory, signals, the console, and how Paddle is imported."""
