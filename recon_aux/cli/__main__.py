"""``python -m recon_aux.cli`` is ``recon-aux``."""

from recon_aux.cli import main

if __name__ == "__main__":
    main()
