"""`python -m dynrec_jax VERB`."""

import sys

from dynrec_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
