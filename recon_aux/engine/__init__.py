"""How the task is attached to a live model. It knows the task, and no framework."""
