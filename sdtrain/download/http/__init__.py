"""Fetches from the web: public addresses only, within limits, politely, and with a reason for every failure."""
