"""Model configurations in Hugging Face's and PaddleNLP's fields."""
