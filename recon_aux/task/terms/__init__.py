"""The terms of the task's loss, one file each."""
