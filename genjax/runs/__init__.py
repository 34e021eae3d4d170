"""Run folders: what the commands read and write."""
