"""Text and table files of any size, read in bounded memory."""
