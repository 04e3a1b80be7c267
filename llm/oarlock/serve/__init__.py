"""Serves models: the engine, Triton and its front with the OpenAI-compatible endpoint, chat."""
