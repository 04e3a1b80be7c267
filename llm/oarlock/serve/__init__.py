"""Answers from exported directories: the engine, Triton, the OpenAI-compatible endpoint, chat."""
