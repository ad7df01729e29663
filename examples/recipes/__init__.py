"""Scripts of a few lines: recon_aux with one trainer, or with one kind of encoder, each."""
