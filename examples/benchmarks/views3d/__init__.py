"""Does an encoder keep how an object turned? Rendered objects, and the comparison with SIE."""
