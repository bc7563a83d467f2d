"""Asks OpenAI-compatible servers (vLLM, SGLang, `transformers serve`) about images, within a budget."""
