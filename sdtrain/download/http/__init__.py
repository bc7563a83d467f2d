"""Fetches from the web: only public addresses, within limits, politely, with a reason for every failure."""
