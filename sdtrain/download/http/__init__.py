"""The way to the web: public addresses only, within limits, with manners, and every failure has a reason."""
