"""One file for each framework; none is imported before it is asked for."""
