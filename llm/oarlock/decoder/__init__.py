"""Our decoder: one causal language model for all families of Llama's kind."""
