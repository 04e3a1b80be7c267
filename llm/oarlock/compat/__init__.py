"""What is changed in Paddle and PaddleNLP."""
