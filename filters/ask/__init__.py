"""The ASK stage: answers to the questions of rules in words, about every image."""
