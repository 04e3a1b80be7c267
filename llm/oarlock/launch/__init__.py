"""`oarlock launch`: start the ranks of a training script, pass signals on, and restart them when they fail.

Nothing here imports Paddle; the ranks do.
"""
