"""The process and its machine: cores, ranks, memory, signals, the console, and the import of Paddle."""
