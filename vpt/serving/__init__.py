"""Serving a trained model: an endpoint of the OpenAI chat format, with continuous batching, and a page to watch it."""
