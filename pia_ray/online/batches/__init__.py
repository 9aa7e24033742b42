"""Batches of the OpenAI protocol: their documents, the loop that runs their lines, and their result files."""
