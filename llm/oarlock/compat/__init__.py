"""Changes to Paddle and PaddleNLP."""
