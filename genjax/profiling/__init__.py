"""What a step costs: measured on this machine, or compiled for one that is not here."""
