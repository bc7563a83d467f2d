"""Prompt following: a vision-language model answers questions about the images, as in GenEval 2 and VQAScore."""
