"""What is learned: the image-reconstruction task. It needs torch and einops only."""
