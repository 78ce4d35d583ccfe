"""Does an engine decode as the release does? Small checkpoints, recorded noise, and what has to come of them.

docs/conformance.md tells the format and how to bring an engine of your own.
"""
