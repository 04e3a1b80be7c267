"""One file of plain data per model family. Nothing here imports Paddle."""
